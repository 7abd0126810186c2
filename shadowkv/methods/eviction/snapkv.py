"""SnapKV: keep the prompt tokens that its last queries attend to, and drop the rest once.

Paper: https://arxiv.org/abs/2404.14469. Known differences from the authors' code:
- one selection per KV head, by default from the mean over its query heads (theirs repeats keys and values for every
  query head first, selects per query head and so stores a group's tokens once per query head);
- scores are pooled per query head, as theirs, and then reduced over the group. PyramidKV's authors, whose code can also
  keep one set per KV head, reduce first; kvpress pools first. Sums and means of averages do not depend on the order,
  nor does group_max of maxima: what does is pooling=max with group_mean or group_sum, and group_max with pooling=avg;
- of equal scores, which pooling=max makes, the earlier token is kept; theirs leaves it to torch's `topk`.
As theirs: the defaults, a prompt of up to `budget` tokens kept whole, averages with zeros beyond both ends (which
lowers those of the tokens right before the window), and a later turn sees only what the first one's queries selected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Dims
from shadowkv.contract.layerwise import DenseLayer, EvictingMethod, LayerState
from shadowkv.contract.method import OBSERVED_QUERIES, LayerKV, Method
from shadowkv.contract.setting import require
from shadowkv.tensors import ops

# Scores [B,Hq,n] and a kernel -> each score with its neighbours, [B,Hq,n].
_POOLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "avg": lambda scores, kernel: F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2),
    "max": lambda scores, kernel: F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2),
}


@dataclass(frozen=True)
class SnapKV(EvictingMethod):
    """budget: prompt tokens kept, the window included · window: last queries observed, whose tokens are kept ·
    kernel: tokens pooled, odd (1: off) · pooling: avg or max · reduce: group_max, group_mean or group_sum."""

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "drops prompt tokens once, keeps those its last queries attend to"
    paper: ClassVar[str] = "2404.14469"
    compared: ClassVar[str | None] = (
        "FasterDecoding/SnapKV@e216ddc, 2026-11-25: same tokens per head; "
        "of groups, by mean and avg, as Zefan-Cai/KVCache-Factory@c97f9d7"
    )

    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    reduce: str = "group_mean"

    def __post_init__(self) -> None:
        require(
            1 <= self.window <= OBSERVED_QUERIES,
            f"{self.name}: window must be 1 to {OBSERVED_QUERIES} queries, got {self.window}",
        )
        require(
            self.budget > self.window,
            f"{self.name}: budget={self.budget} must be larger than window={self.window}, which it includes",
        )
        require(
            self.kernel >= 1 and self.kernel % 2 == 1,
            f"{self.name}: kernel must be odd and at least 1, got {self.kernel}",
        )
        require(
            self.pooling in _POOLINGS,
            f"{self.name}: pooling={self.pooling} is unknown; one of {', '.join(_POOLINGS)}",
        )
        require(
            self.reduce in ops.SHARED_REDUCTIONS,
            f"{self.name}: reduce={self.reduce} is unknown; one of {', '.join(ops.SHARED_REDUCTIONS)}",
        )

    def layer_budget(self, depth: float, tokens: int) -> int:
        """Of a prompt of `tokens`, how many the layer at `depth` may keep (0: the first layer, 1: the last)."""
        return self.budget

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        budget = self.layer_budget(kv.depth, kv.k.shape[2])
        if kv.k.shape[2] <= budget:
            return DenseLayer(kv.k, kv.v)
        kept = self.kept_tokens(kv, budget)
        return DenseLayer(ops.gather_tokens(kv.k, kept), ops.gather_tokens(kv.v, kept))

    def kept_tokens(self, kv: LayerKV, budget: int) -> Tensor:
        """Ascending positions of the tokens to keep of a prompt longer than `budget`: [B,H,budget]."""
        batch, heads, tokens, _ = kv.k.shape
        older = tokens - self.window
        received = ops.received_attention(kv.q_tail[:, :, -self.window :], kv.k, kv.scaling)[..., :older]
        pooled = _POOLINGS[self.pooling](received.flatten(1, 2), self.kernel).view_as(received)
        scores = ops.SHARED_REDUCTIONS[self.reduce](pooled).squeeze(2)
        window = torch.arange(older, tokens, device=kv.k.device).expand(batch, heads, -1)
        return torch.cat((ops.top_indices(scores, budget - self.window), window), dim=2)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        return min(tokens, self.budget) + later

    @property
    def least_budget(self) -> int:
        return self.window + 1

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return replace(self, budget=max(tokens, self.window + 1))
