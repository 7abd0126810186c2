"""Oracle: the tokens with the largest true attention weights, which no method can know without reading all keys.

Not a system but the bound of every selector: no choice of as many tokens holds more of the attention. The name and
idea are folklore; top-k attention itself is from https://arxiv.org/abs/2106.06899 and the choice by mass (top-p)
from https://arxiv.org/abs/2502.02770. Known differences: exact weights where those works estimate or chunk them.
Weights of what is kept are normalised again, as every method's are. The newest token is a candidate like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.layerwise import LayerState, LayerwiseMethod, StepwiseState
from shadowkv.contract.method import LayerKV, Method
from shadowkv.contract.setting import require
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer


@dataclass(frozen=True)
class Oracle(LayerwiseMethod):
    """budget: tokens attended to per step · top_p: instead of budget, the fewest tokens with this share of the
    attention (0: off) · reduce: per_q_head, group_max, group_mean or group_sum."""

    name: ClassVar[str] = "oracle"
    summary: ClassVar[str] = "bound, not a system: reads the full cache to find the tokens with the largest weights"
    paper: ClassVar[str] = "2106.06899"

    budget: int = 2048
    top_p: float = 0.0
    reduce: str = "per_q_head"

    def __post_init__(self) -> None:
        require(self.budget >= 1, f"oracle: budget must be at least 1, got {self.budget}")
        require(0 <= self.top_p <= 1, f"oracle: top_p={self.top_p} is not in [0, 1]")
        require(not self.top_p or self.budget == Oracle.budget, "oracle: give either budget or top_p, not both")
        require(
            self.reduce in ops.GROUP_REDUCTIONS,
            f"oracle: reduce={self.reduce} is unknown; one of {', '.join(ops.GROUP_REDUCTIONS)}",
        )

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        return _OracleLayer(self, kv)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        return Bytes(dims.full_bytes_per_token, 0)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        return tokens + later if self.top_p else min(tokens + later, self.budget)

    def step_flop(self, dims: Dims, tokens: int) -> int:
        # Values of tokens that were not chosen are weighed by zero.
        return 4 * dims.layers * dims.q_heads * dims.head_dim * tokens

    def with_budget(self, tokens: int) -> Method | None:
        return None if self.top_p else replace(self, budget=tokens)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return replace(self, budget=tokens, top_p=0.0)


class _OracleLayer(StepwiseState):
    def __init__(self, method: Oracle, kv: LayerKV) -> None:
        self._budget, self._top_p = method.budget, method.top_p
        self._reduce = ops.GROUP_REDUCTIONS[method.reduce]
        self._k, self._v = TokenBuffer(kv.k, axis=2), TokenBuffer(kv.v, axis=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._k.append(k)
        self._v.append(v)
        if not self._top_p and self._budget >= len(self._k):
            return ops.attend(q, [(self._k.view, self._v.view)], scaling)
        scores = ops.attention_scores(q, self._k.view, scaling)
        weights = self._reduce(scores.softmax(dim=-1))
        chosen = _largest_with_mass(weights, self._top_p) if self._top_p else ops.top_mask(weights, self._budget)
        # Masked before the softmax: a query whose weights on its group's tokens all round to zero stays finite.
        kept = scores.masked_fill(~chosen, float("-inf")).softmax(dim=-1)
        return ops.weighted_values(kept, self._v.view)

    def nbytes(self) -> Bytes:
        return Bytes(self._k.nbytes() + self._v.nbytes(), 0)


def _largest_with_mass(weights: Tensor, share: float) -> Tensor:
    """True for the fewest weights that sum to `share` of all. weights [..., n] -> bool [..., n]."""
    order = weights.sort(dim=-1, descending=True, stable=True)
    before = order.values.cumsum(dim=-1) - order.values
    needed = before < share * weights.sum(dim=-1, keepdim=True)
    return torch.zeros_like(needed).scatter(-1, order.indices, needed)
