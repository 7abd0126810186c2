"""TOVA: when the cache is full, the token that the newest query attends to least makes room.

Paper: https://arxiv.org/abs/2401.06104. Known differences from the authors' code:
- `budget` counts the newest token: the weakest goes right before a new one comes, so that no step attends to more
  (theirs drops it right after, and a step attends to cache_size + 1);
- the newest token is never dropped by its own query; theirs can be.
As theirs, a prompt given at once is computed densely, and its last query then chooses what is kept (the paper's stream
of tokens would have dropped one at every prompt query); one choice serves all heads of a layer, and tokens keep their
true positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.layerwise import EvictingMethod, LayerState, StepwiseState
from shadowkv.contract.method import LayerKV, Method
from shadowkv.contract.setting import require
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer


@dataclass(frozen=True)
class TOVA(EvictingMethod):
    """budget: tokens held."""

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "drops the token that the newest query attends to least, over all heads of a layer"
    paper: ClassVar[str] = "2401.06104"
    compared: ClassVar[str | None] = (
        "schwartz-lab-NLP/TOVA@9c7d09b, 2026-11-25: same tokens, where theirs keeps the newest"
    )

    def __post_init__(self) -> None:
        require(self.budget >= 1, f"tova: budget must be at least 1, got {self.budget}")

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        return _TovaLayer(self, kv)

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        held = min(tokens, self.budget)
        return {**super().memory_parts(dims, tokens), "scores": Bytes(held * dims.layers * 4, 0)}

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return replace(self, budget=tokens)


class _TovaLayer(StepwiseState):
    def __init__(self, method: TOVA, kv: LayerKV) -> None:
        self._budget = method.budget
        k, v = kv.k, kv.v
        # How much the newest query attends to each token held, but endlessly to itself. [B,n] fp32
        self._attended = ops.attention_weights(kv.q_tail[:, :, -1:], k, kv.scaling).mean(dim=(1, 2))
        self._attended[:, -1] = float("inf")
        if k.shape[2] > method.budget:
            kept = ops.top_indices(self._attended, method.budget)
            self._attended = self._attended.gather(1, kept)
            by_head = kept[:, None].expand(-1, k.shape[1], -1)
            k, v = ops.gather_tokens(k, by_head), ops.gather_tokens(v, by_head)
        self._k, self._v = TokenBuffer(k, axis=2), TokenBuffer(v, axis=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        if len(self._k) < self._budget:
            self._k.append(k)
            self._v.append(v)
            newest = self._attended.new_full((k.shape[0], 1), len(self._k) - 1).long()
        else:
            newest = ops.weakest(self._attended)  # its place is free now
            by_head = newest[:, None].expand(-1, k.shape[1], -1)
            self._k.put(by_head, k)
            self._v.put(by_head, v)
        weights = ops.attention_weights(q, self._k.view, scaling)
        self._attended = weights.mean(dim=(1, 2)).scatter(1, newest, float("inf"))
        return ops.weighted_values(weights, self._v.view)

    def nbytes(self) -> Bytes:
        return Bytes(self._k.nbytes() + self._v.nbytes() + self._attended.nbytes, 0)
