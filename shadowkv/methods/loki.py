"""Loki: rank tokens by the first few principal components of their keys, attend to the best with all of them.

Paper: https://arxiv.org/abs/2406.02542. Known differences from the authors' code:
- components are those of the prompt's own keys, after RoPE, per layer and KV head, and new tokens are projected on
  them; theirs come from a calibration text. No data is needed, but a very short prompt has few directions to offer;
- `budget` is in tokens; theirs is a share of the context (a quarter);
- the projected keys are a copy beside the full ones, which stay as they are; theirs turns the full keys and reads
  their first columns, which costs no memory but strided reads;
- keys are centred before the projection, which moves all scores of a query alike and so changes no weight.
As theirs, each query head ranks for itself and the newest token is a candidate like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from shadowkv import low_rank, ops
from shadowkv.buffers import TokenBuffer
from shadowkv.dims import Bytes, Dims
from shadowkv.layerwise import LayerState, LayerwiseMethod, StepwiseState
from shadowkv.method import LayerKV, Method, require
from shadowkv.ranges import ranged
from shadowkv.rope import Rope


@dataclass(frozen=True)
class Loki(LayerwiseMethod):
    """budget: tokens attended to per step · rank: components that rank them (auto: a quarter of the head size) ·
    reduce: per_q_head, group_max, group_mean or group_sum."""

    name: ClassVar[str] = "loki"
    summary: ClassVar[str] = "full cache, reads the tokens with the largest q k in a few principal components"
    paper: ClassVar[str] = "2406.02542"

    budget: int = 2048
    rank: int | None = None
    reduce: str = "per_q_head"

    def __post_init__(self) -> None:
        require(self.budget >= 1, f"loki: budget must be at least 1, got {self.budget}")
        require(self.rank is None or self.rank >= 1, f"loki: rank must be at least 1, got {self.rank}")
        require(
            self.reduce in ops.GROUP_REDUCTIONS,
            f"loki: reduce={self.reduce} is unknown; one of {', '.join(ops.GROUP_REDUCTIONS)}",
        )

    def rank_for(self, head_dim: int) -> int:
        """Components used on heads of this size."""
        return max(head_dim // 4, 1) if self.rank is None else self.rank

    def check(self, dims: Dims) -> None:
        require(
            self.rank is None or self.rank <= dims.head_dim,
            f"loki: rank={self.rank} exceeds the head size of this model, {dims.head_dim}",
        )

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        return _LokiLayer(self, kv)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        projected = dims.layers * dims.kv_heads * self.rank_for(dims.head_dim) * dims.element_bytes
        return Bytes(dims.full_bytes_per_token + projected, 0)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        return min(tokens + later, self.budget)

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        heads, rank = dims.layers * dims.kv_heads, self.rank_for(dims.head_dim)
        basis = heads * (rank + 1) * dims.head_dim * 4  # components and mean of the keys, fp32
        return {
            "keys and values": Bytes(tokens * dims.full_bytes_per_token, 0),
            "projected keys": Bytes(heads * tokens * rank * dims.element_bytes + basis, 0),
        }

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        return dims.gathered_bytes(self.reduce, self.budget, tokens)

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        gathered = self.workspace_bytes(dims, tokens)
        if not gathered:
            return tokens * dims.full_bytes_per_token
        return self.memory_parts(dims, tokens)["projected keys"].device + dims.layers * gathered

    def step_flop(self, dims: Dims, tokens: int) -> int:
        ranked = tokens * self.rank_for(dims.head_dim) if self.budget <= tokens else 0
        return super().step_flop(dims, tokens) + 2 * dims.layers * dims.q_heads * ranked

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return replace(self, budget=tokens)


class _LokiLayer(StepwiseState):
    def __init__(self, method: Loki, kv: LayerKV) -> None:
        self._budget = method.budget
        self._reduce = ops.GROUP_REDUCTIONS[method.reduce]
        self._k, self._v = TokenBuffer(kv.k, axis=2), TokenBuffer(kv.v, axis=2)
        # Every KV head is fitted for itself: heads are rows of a batch to `low_rank`.
        heads = kv.k.flatten(0, 1).split(low_rank.BLOCK_TOKENS, dim=1)
        self._basis = low_rank.fit(heads, method.rank_for(kv.k.shape[-1]))
        self._projected = TokenBuffer(self._project(kv.k), axis=2)

    def _project(self, k: Tensor) -> Tensor:
        """[B,H,n,D] -> [B,H,n,r]."""
        return self._basis.project(k.flatten(0, 1)).view(*k.shape[:3], -1).to(k.dtype)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._k.append(k)
        self._v.append(v)
        self._projected.append(self._project(k))
        keys, values = self._k.view, self._v.view
        if self._budget >= len(self._k):
            return ops.attend(q, [(keys, values)], scaling)
        index = self._best(q, scaling)
        return ops.attend(q, [(ops.gather_lists(keys, index), ops.gather_lists(values, index))], scaling)

    @ranged("selection")
    def _best(self, q: Tensor, scaling: float) -> Tensor:
        """The tokens to attend to, for each list of a KV head. [B,H,L,s]."""
        by_group = q.reshape(q.shape[0] * self._k.view.shape[1], -1, q.shape[-1])
        q_projected = (by_group.float() @ self._basis.vectors.mT).view(*q.shape[:3], -1)
        # Weights and not scores, which have no common zero that would let heads of a group be compared.
        weights = self._reduce(ops.attention_weights(q_projected, self._projected.view, scaling))
        return ops.top_indices(weights, self._budget)

    def nbytes(self) -> Bytes:
        buffers = sum(buffer.nbytes() for buffer in (self._k, self._v, self._projected))
        return Bytes(buffers + sum(t.nbytes for t in self._basis), 0)
