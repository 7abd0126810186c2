"""StreamingLLM: attention sinks (the first tokens) and a rolling window of the newest ones, nothing between.

Paper: https://arxiv.org/abs/2309.17453. Known differences from the authors' code:
- the prompt is computed densely and then cropped, so that deeper layers have seen tokens that are gone. Theirs drops
  token by token where perplexity is measured; in their chat example room is made before each prompt, for it and its
  answer, and nothing is dropped until the next;
- positions inside the cache (`rerotate`) by turning only the sinks, towards the window. RoPE sees nothing but
  distances, and those within the window are the true ones in the cache as well; the authors keep all keys before
  RoPE and turn each of them at every step. Attention is the same but for rounding. Where frequencies depend on the
  sequence's length (longrope), they stay those of the whole sequence;
- `budget` counts the newest token: theirs holds start_size + recent_size between steps, and a step attends to one more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.layerwise import EvictingMethod, LayerState, StepwiseState
from shadowkv.contract.method import LayerKV, Method, require_rotary
from shadowkv.contract.setting import require
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer


@dataclass(frozen=True)
class StreamingLLM(EvictingMethod):
    """budget: tokens held, sinks and window · sinks: first tokens kept for good · rerotate: positions inside the
    cache (paper) instead of the true ones."""

    name: ClassVar[str] = "streaming"
    summary: ClassVar[str] = "the first tokens and a rolling window of the newest, nothing between"
    paper: ClassVar[str] = "2309.17453"
    compared: ClassVar[str | None] = "mit-han-lab/streaming-llm@2e50426, 2026-11-25: same attention to 1e-5"

    sinks: int = 4
    rerotate: bool = True

    def __post_init__(self) -> None:
        require(self.sinks >= 0, f"streaming: sinks must not be negative, got {self.sinks}")
        require(
            self.budget > self.sinks,
            f"streaming: budget={self.budget} must be larger than sinks={self.sinks}, which it includes",
        )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        if self.rerotate:
            require_rotary(dims, self.name)

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        return _StreamingLayer(self, layer, kv, rope)

    @property
    def least_budget(self) -> int:
        return self.sinks + 1

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return replace(self, budget=max(tokens, self.sinks + 1))


class _StreamingLayer(StepwiseState):
    """Slots [0, sinks) hold the first tokens; the others are a ring, in which order does not matter."""

    def __init__(self, method: StreamingLLM, layer: int, kv: LayerKV, rope: Rope) -> None:
        self._layer, self._rope = layer, rope
        self._budget, self._sinks, self._rerotate = method.budget, method.sinks, method.rerotate
        self._tokens = kv.k.shape[2]
        self._oldest = method.sinks  # slot of the oldest token outside the sinks
        self._k, self._v = (TokenBuffer(self._cropped(x), axis=2) for x in (kv.k, kv.v))

    def _cropped(self, x: Tensor) -> Tensor:
        if self._tokens <= self._budget:
            return x
        return torch.cat((x[:, :, : self._sinks], x[:, :, self._sinks - self._budget :]), dim=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._tokens += 1
        if len(self._k) < self._budget:
            self._k.append(k)
            self._v.append(v)
        else:
            slot = torch.full((*k.shape[:2], 1), self._oldest, device=k.device)
            self._k.put(slot, k)
            self._v.put(slot, v)
            self._oldest = self._oldest + 1 if self._oldest + 1 < self._budget else self._sinks
        keys, values = self._k.view, self._v.view
        evicted = self._tokens - len(self._k)
        if not (self._rerotate and evicted and self._sinks):
            return ops.attend(q, [(keys, values)], scaling)
        # The window's oldest token follows the last sink, so the sinks move up by what is missing between them.
        sinks = (self._moved(keys[:, :, : self._sinks], evicted), values[:, :, : self._sinks])
        return ops.attend(q, [sinks, (keys[:, :, self._sinks :], values[:, :, self._sinks :])], scaling)

    def _moved(self, keys: Tensor, by_tokens: int) -> Tensor:
        """Keys of the first positions as if each were `by_tokens` later."""
        positions = torch.arange(keys.shape[2], device=keys.device)
        pre_rope = self._rope.unrotate(self._layer, keys, positions, self._tokens)
        return self._rope.rotate(self._layer, pre_rope, positions + by_tokens, self._tokens).to(keys.dtype)

    def nbytes(self) -> Bytes:
        return Bytes(self._k.nbytes() + self._v.nbytes(), 0)
