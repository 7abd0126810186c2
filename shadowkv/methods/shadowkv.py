"""ShadowKV: low-rank pre-RoPE keys on the device, values on the host, a few chunks rebuilt per step.

Paper: https://arxiv.org/abs/2410.21465. Known differences from the authors' code:
- every selected key is rebuilt from its factors at every step, so a result does not depend on which chunks an
  earlier step happened to hold (their fast path keeps exact keys for as long as a chunk stays selected);
- all prompt chunks but the newest `local` ones are candidates, whatever the prompt's length;
- outlier chunks scale with the budget (24 per 1024 tokens) instead of being 48, or 0 below a budget of 1024;
- keys are centred before the factorisation, which is by the Gram matrix in fp64 instead of a full SVD;
- generated tokens never run out of room: the newest `window` stay exact, older ones become chunks, projected on
  the prompt's basis. They are not searched for outliers;
- values can be kept in 8 bits on the host (`values`), which halves what a step fetches; theirs are bf16;
- several new tokens at once (a second turn) each choose their own chunks, as they would one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowkv import low_rank, ops
from shadowkv.buffers import TokenBuffer
from shadowkv.errors import SkvError
from shadowkv.host import CODINGS, HostTokens
from shadowkv.layerwise import LayerState, LayerwiseMethod, StepwiseState
from shadowkv.method import Bytes, Dims, LayerKV, Method, largest_within, require
from shadowkv.rope import Rope

_OUTLIERS_PER_BUDGET_TOKEN = 24 / 1024  # the authors' density


@dataclass(frozen=True)
class ShadowKV(LayerwiseMethod):
    """rank: directions kept of a layer's keys · budget: tokens rebuilt per step · chunk: tokens per landmark ·
    local: newest prompt chunks kept exact · outliers: badly summarised chunks kept exact (auto: 24 per 1024 of
    budget) · energy: choose the rank per layer by this share of the squared norm, instead of rank (0: off) ·
    window: newest generated tokens kept exact · values: native, int8 or fp8 on the host."""

    name: ClassVar[str] = "shadowkv"
    summary: ClassVar[str] = "low-rank keys on the device, values on the host, landmark-selected chunks rebuilt"
    paper: ClassVar[str] = "2410.21465"

    rank: int = 160
    budget: int = 2048
    chunk: int = 8
    local: int = 4
    outliers: int | None = None
    energy: float = 0.0
    window: int = 128
    values: str = "native"

    def __post_init__(self) -> None:
        require(self.chunk >= 1, f"shadowkv: chunk must be at least 1, got {self.chunk}")
        require(self.rank >= 1, f"shadowkv: rank must be at least 1, got {self.rank}")
        require(
            self.budget >= self.chunk,
            f"shadowkv: budget={self.budget} is smaller than one chunk of {self.chunk} tokens",
        )
        require(self.local >= 0, f"shadowkv: local must not be negative, got {self.local}")
        require(self.window >= 1, f"shadowkv: window must be at least 1, got {self.window}")
        require(self.outliers is None or self.outliers >= 0, f"shadowkv: outliers={self.outliers} is negative")
        require(0 <= self.energy <= 1, f"shadowkv: energy={self.energy} is not in [0, 1]")
        require(
            not self.energy or self.rank == ShadowKV.rank,
            "shadowkv: give either rank or energy, not both",
        )
        require(
            self.values in CODINGS,
            f"shadowkv: values={self.values} is unknown; one of {', '.join(CODINGS)}",
        )

    @property
    def outlier_chunks(self) -> int:
        """Chunks kept exact because their landmark summarises them badly."""
        return round(self.budget * _OUTLIERS_PER_BUDGET_TOKEN) if self.outliers is None else self.outliers

    @property
    def cost_follows_text(self) -> bool:
        return bool(self.energy)

    def check(self, dims: Dims) -> None:
        require(
            bool(self.energy) or self.rank <= dims.width,
            f"shadowkv: rank={self.rank} exceeds the width of this model's keys, {dims.width} "
            f"({dims.kv_heads} KV heads of {dims.head_dim}); give rank={dims.width} or less",
        )

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        return _ShadowLayer(self, layer, kv, rope)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        # With `energy` the rank depends on the prompt; the full width is its upper bound.
        rank = dims.width if self.energy else self.rank
        per_layer = (rank + dims.width / self.chunk) * dims.element_bytes + dims.kv_heads * 4 / self.chunk
        value_bytes = CODINGS[self.values].token_bytes(dims.head_dim, dims.element_bytes)
        return Bytes(round(dims.layers * per_layer), dims.layers * dims.kv_heads * value_bytes)

    def prompt_bytes(self, dims: Dims, tokens: int) -> Bytes:
        chunks = max(tokens // self.chunk - self.local, 0)
        context = chunks * self.chunk
        exact = min(self.outlier_chunks, chunks) * self.chunk + tokens - context
        rank = dims.width if self.energy else self.rank
        basis = (rank + 1) * dims.width * dims.element_bytes  # directions and mean of the keys
        per_token = self.bytes_per_token(dims)
        device = context * per_token.device + exact * dims.full_bytes_per_token + dims.layers * basis
        return Bytes(device, context * per_token.host)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        chunks = self.budget // self.chunk + self.outlier_chunks + self.local
        # Of later tokens the newest stay exact, and the others become chunks to choose from.
        exact = tokens % self.chunk + min(later, self.window + self.chunk - 1)
        return min(tokens + later, chunks * self.chunk + exact)

    def bus_bytes(self, dims: Dims, tokens: int) -> int:
        candidates = max(tokens // self.chunk - self.local - self.outlier_chunks, 0)
        read = min(candidates, self.budget // self.chunk) * self.chunk
        coding = CODINGS[self.values].token_bytes(dims.head_dim, dims.element_bytes)
        return dims.layers * dims.kv_heads * read * coding

    def with_budget(self, tokens: int) -> Method:
        # The outliers grow with the budget, so the largest one that leaves room for them is searched for.
        for budget in range(tokens // self.chunk * self.chunk, 0, -self.chunk):
            setting = replace(self, budget=budget)
            # The prompt's last tokens, too few for a chunk, are attended to as well.
            if budget + (setting.outlier_chunks + self.local + 1) * self.chunk - 1 <= tokens:
                return setting
        raise SkvError(f"shadowkv: {tokens} tokens leave no room beside outliers and {self.local} local chunks")

    def with_kv_bytes(self, dims: Dims, tokens: int, kv_bytes: int) -> Method:
        return largest_within(lambda n: replace(self, rank=n, energy=0.0), 1, dims.width, dims, tokens, kv_bytes)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        budget = -(-tokens // self.chunk) * self.chunk
        return replace(self, rank=dims.width, energy=0.0, budget=budget, outliers=2, window=16, values="native")


class _ShadowLayer(StepwiseState):
    """Tokens [0, context) are chunks: factors and landmarks here, values on the host. The rest is the exact tail."""

    def __init__(self, method: ShadowKV, layer: int, kv: LayerKV, rope: Rope) -> None:
        self._layer, self._rope = layer, rope
        self._chunk, self._chunks_read = method.chunk, method.budget // method.chunk
        batch, heads, tokens, head_dim = kv.k.shape
        chunks = max(tokens // method.chunk - method.local, 0)
        self._context_tokens = chunks * method.chunk
        self._tail_room = tokens - self._context_tokens + method.window
        self._tokens = tokens

        keys, values = kv.k[:, :, : self._context_tokens], kv.v[:, :, : self._context_tokens]
        pre_rope = self._pre_rope(kv.k, first=0)
        basis = low_rank.fit(pre_rope, method.rank, method.energy)
        coefficients = basis.project(pre_rope[:, : self._context_tokens]).to(kv.k.dtype)
        self._coefficients = TokenBuffer(coefficients, axis=1)
        self._basis = low_rank.Basis(*(x.to(kv.k.dtype) for x in basis))
        self._values = HostTokens(values, method.values)

        chunked = keys.reshape(batch, heads, chunks, method.chunk, head_dim)
        landmarks = chunked.float().mean(dim=3)
        outliers = _worst_summarised(chunked, landmarks, min(method.outlier_chunks, chunks))
        regular = _complement(outliers, chunks)
        self._landmarks = TokenBuffer(ops.gather_tokens(landmarks, regular).to(kv.k.dtype), axis=2)
        self._landmark_chunks = TokenBuffer(regular.int(), axis=2)
        outlier_tokens = ops.token_indices(outliers, method.chunk)
        self._outlier_k = ops.gather_tokens(keys, outlier_tokens)
        self._outlier_v = ops.gather_tokens(values, outlier_tokens)
        self._tail_k = TokenBuffer(kv.k[:, :, self._context_tokens :], axis=2)
        self._tail_v = TokenBuffer(kv.v[:, :, self._context_tokens :], axis=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._tail_k.append(k)
        self._tail_v.append(v)
        self._tokens += 1
        if len(self._tail_k) >= self._tail_room + self._chunk:
            self._chunk_oldest_tail()
        exact = [(self._outlier_k, self._outlier_v), (self._tail_k.view, self._tail_v.view)]
        if not len(self._landmarks):
            return ops.attend(q, exact, scaling)
        return ops.attend(q, [self._select(q, scaling), *exact], scaling)

    def _select(self, q: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Keys and values of the chunks that matter most to q, rebuilt and fetched. [B,H,s,D] each."""
        scores = ops.chunk_scores(q, self._landmarks.view, scaling)
        best = ops.top_indices(scores, self._chunks_read)
        chunks = self._landmark_chunks.view.gather(2, best).long()
        index = ops.token_indices(chunks, self._chunk)
        k = ops.rebuild(self._coefficients.view, *self._basis, index)
        k = self._rope.rotate(self._layer, k, index, self._tokens)
        return k, self._values.gather(index)

    def _chunk_oldest_tail(self) -> None:
        """Move the oldest chunk of the tail into the context, as if the prompt had ended after it."""
        keys = self._tail_k.view[:, :, : self._chunk].clone()
        values = self._tail_v.view[:, :, : self._chunk]
        coefficients = self._basis.project(self._pre_rope(keys, first=self._context_tokens))
        self._coefficients.append(coefficients.to(keys.dtype))
        self._values.append(values)
        self._landmarks.append(keys.float().mean(dim=2, keepdim=True).to(keys.dtype))
        number = self._context_tokens // self._chunk
        self._landmark_chunks.append(torch.full((*keys.shape[:2], 1), number, dtype=torch.int32, device=keys.device))
        self._tail_k.drop_front(self._chunk)
        self._tail_v.drop_front(self._chunk)
        self._context_tokens += self._chunk

    def _pre_rope(self, keys: Tensor, first: int) -> Tensor:
        """Keys of consecutive positions from `first` on, before RoPE. [B,H,n,D] -> [B,n,W] fp32."""
        positions = torch.arange(first, first + keys.shape[2], device=keys.device)
        return self._rope.unrotate(self._layer, keys, positions, self._tokens).transpose(1, 2).flatten(2)

    def nbytes(self) -> Bytes:
        buffers = (self._coefficients, self._landmarks, self._landmark_chunks, self._tail_k, self._tail_v)
        tensors = (*self._basis, self._outlier_k, self._outlier_v)
        device = sum(b.nbytes() for b in buffers) + sum(t.nbytes for t in tensors)
        return Bytes(device, self._values.nbytes())


def _worst_summarised(chunked: Tensor, landmarks: Tensor, count: int) -> Tensor:
    """The chunks with a token least like its landmark. chunked [B,H,C,c,D] -> ascending chunk numbers [B,H,count]."""
    likeness = F.cosine_similarity(chunked.float(), landmarks[:, :, :, None], dim=-1).amin(dim=-1)
    return ops.top_indices(-likeness, count) if count else likeness[..., :0].long()


def _complement(chosen: Tensor, total: int) -> Tensor:
    """The numbers below `total` that are not in `chosen` [B,H,o], ascending: [B,H,total-o]."""
    batch, heads, count = chosen.shape
    kept = torch.ones(batch, heads, total, dtype=torch.bool, device=chosen.device).scatter_(2, chosen, False)
    return kept.nonzero()[:, 2].view(batch, heads, total - count)
