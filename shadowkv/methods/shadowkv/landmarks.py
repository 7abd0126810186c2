"""Chunks of a context that are chosen by the mean of their keys. ShadowKV, algorithms 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowkv.common.errors import SkvError
from shadowkv.contract.method import Method
from shadowkv.contract.setting import require
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer
from shadowkv.tensors.stacking import Stackable

_BLOCK_TOKENS = 8192
_OUTLIERS_PER_BUDGET_TOKEN = 24 / 1024  # the authors' density


@dataclass(frozen=True)
class SelectsChunks(Method):
    """What methods that read chunks have in common: `budget` tokens read of chunks that are chosen anew for every
    token, beside the newest `local` chunks of the prompt and the `outliers`, which are always read."""

    budget: int = 2048
    chunk: int = 8
    local: int = 4
    outliers: int | None = None

    def __post_init__(self) -> None:
        require(self.chunk >= 1, f"{self.name}: chunk must be at least 1, got {self.chunk}")
        require(
            self.budget >= self.chunk,
            f"{self.name}: budget={self.budget} is smaller than one chunk of {self.chunk} tokens",
        )
        require(self.local >= 0, f"{self.name}: local must not be negative, got {self.local}")
        require(self.outliers is None or self.outliers >= 0, f"{self.name}: outliers={self.outliers} is negative")

    @property
    def outlier_chunks(self) -> int:
        """Chunks kept exact because their landmark summarises them badly."""
        return round(self.budget * _OUTLIERS_PER_BUDGET_TOKEN) if self.outliers is None else self.outliers

    def context_tokens(self, tokens: int) -> int:
        """Of a prompt of `tokens`, those in chunks that can be chosen or are outliers."""
        return max(tokens // self.chunk - self.local, 0) * self.chunk

    def landmarks(self, tokens: int) -> int:
        """Of a prompt of `tokens`, the chunks that can be chosen."""
        return max(self.context_tokens(tokens) // self.chunk - self.outlier_chunks, 0)

    def chosen_tokens(self, tokens: int) -> int:
        """Of a prompt of `tokens`, how many are read because their chunks are chosen."""
        return min(self.landmarks(tokens), self.budget // self.chunk) * self.chunk

    def exact_tokens(self, tokens: int) -> int:
        """Of a prompt of `tokens`, those that are kept as they are: outliers and the newest."""
        context = self.context_tokens(tokens)
        return min(self.outlier_chunks * self.chunk, context) + tokens - context

    def within_budget(self, tokens: int) -> Method:
        """This setting with the largest budget that attends to `tokens` tokens at most, outliers and all."""
        # The outliers grow with the budget, so the largest one that leaves room for them is searched for.
        for budget in range(tokens // self.chunk * self.chunk, 0, -self.chunk):
            setting = replace(self, budget=budget)
            # The prompt's last tokens, too few for a chunk, are attended to as well.
            if budget + (setting.outlier_chunks + self.local + 1) * self.chunk - 1 <= tokens:
                return setting
        raise SkvError(f"{self.name}: {tokens} tokens leave no room beside outliers and {self.local} local chunks")


class Landmarks(Stackable):
    """One layer's chunks by their means, [B,H,C,D], without the outliers; chunks are numbered by their place."""

    def __init__(self, means: Tensor, numbers: Tensor, chunk: int) -> None:
        self.chunk = chunk
        self.means = TokenBuffer(means, axis=2)
        self.numbers = TokenBuffer(numbers, axis=2)

    @staticmethod
    def of(keys: Tensor, chunk: int, outliers: int) -> tuple[Landmarks, Tensor]:
        """Landmarks of whole chunks of keys, after RoPE, [B,H,C*chunk,D]; and the outliers' tokens, [B,H,s].

        Outliers are the chunks with the token least like their mean, by its cosine.
        """
        chunks = keys.shape[2] // chunk
        chunked = keys.unflatten(2, (chunks, chunk))
        # Few at a time: in fp32 they take twice or more of what they take in the prompt.
        some = [_summarised(x) for x in chunked.split(max(1, _BLOCK_TOKENS // chunk), dim=2)]
        means, likeness = (torch.cat(parts, dim=2) for parts in zip(*some, strict=True))
        worst = ops.top_indices(-likeness, min(outliers, chunks)) if outliers else likeness[..., :0].long()
        regular = _complement(worst, chunks)
        kept = Landmarks(ops.gather_tokens(means, regular), regular.int(), chunk)
        return kept, ops.token_indices(worst, chunk)

    def __len__(self) -> int:
        return len(self.means)

    def choose(self, q: Tensor, count: int, scaling: float) -> Tensor:
        """Ascending tokens of the `count` chunks that matter most to one query per head. q [B,Hq,1,D] -> [B,H,s]."""
        best = ops.top_indices(ops.chunk_scores(q, self.means.view, scaling), count)
        return ops.token_indices(self.numbers.view.gather(2, best).long(), self.chunk)

    def append(self, keys: Tensor, number: int) -> None:
        """Add chunk `number`. keys [B,H,chunk,D]."""
        self.means.append(keys.float().mean(dim=2, keepdim=True).to(keys.dtype))
        self.numbers.append(torch.full((*keys.shape[:2], 1), number, dtype=torch.int32, device=keys.device))

    def nbytes(self) -> int:
        return self.means.nbytes() + self.numbers.nbytes()


def _summarised(chunked: Tensor) -> tuple[Tensor, Tensor]:
    """Means of chunks [B,H,C,c,D], in their type, [B,H,C,D]; and how like them their least like token is, [B,H,C]."""
    exact = chunked.float()
    means = exact.mean(dim=3)
    likeness = F.cosine_similarity(exact, means[:, :, :, None], dim=-1).amin(dim=-1)
    return means.to(chunked.dtype), likeness


def _complement(chosen: Tensor, total: int) -> Tensor:
    """The numbers below `total` that are not in `chosen` [B,H,o], ascending: [B,H,total-o]."""
    batch, heads, count = chosen.shape
    kept = torch.ones(batch, heads, total, dtype=torch.bool, device=chosen.device).scatter_(2, chosen, False)
    return kept.nonzero()[:, 2].view(batch, heads, total - count)
