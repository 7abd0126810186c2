"""The usual kind of method: layers know nothing of each other, so that building one layer is all there is to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.method import DecodeCache, LayerKV, Method, largest_within
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer
from shadowkv.tensors.stacking import Stackable, can_stack, owned, pick, stack


class LayerState(Stackable, ABC):
    """What is kept of one layer; the arguments are those of `DecodeCache`.

    Its attributes can be stacked (`shadowkv.tensors.stacking`): every tensor has the batch first.
    """

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor: ...

    @abstractmethod
    def nbytes(self) -> Bytes: ...

    def reserve(self, tokens: int) -> None:
        """Make room for this many more tokens per row at once."""

    @property
    def resident_chunks(self) -> Tensor | None:
        """See `DecodeCache.resident_chunks`; None where there is no larger store."""
        return None

    @property
    def chunk_numbers(self) -> Tensor | None:
        """See `DecodeCache.chunk_numbers`."""
        return None


class StepwiseState(LayerState):
    """A layer in which every new token changes what is kept or read: T tokens at once are T steps."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        steps = zip(q.split(1, dim=2), k.split(1, dim=2), v.split(1, dim=2), strict=True)
        return torch.cat([self.step(*step, scaling) for step in steps], dim=2)

    @abstractmethod
    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """`attend` for one token."""


class SteadyState(StepwiseState):
    """A layer whose step is a fixed sequence of operations on tensors that stay where they are."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self.make_room()
        if self.rearranges:
            self.rearrange()
        return self.run(q, k, v, scaling)

    @property
    def capturable(self) -> bool:
        """Whether `run` and `rearrange` never wait for the device, so that a CUDA graph can hold them."""
        return True

    @abstractmethod
    def make_room(self) -> bool:
        """What the host does before a step takes one token per row; True if tensors moved."""

    @property
    def rearranges(self) -> bool:
        """See `DecodeCache.rearranges`."""
        return False

    def rearrange(self) -> None:
        """See `DecodeCache.rearrange`."""

    @abstractmethod
    def run(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """One token per row, after `make_room`: nothing here asks the device for anything."""


class DenseLayer(LayerState):
    """Keys and values as they came, read exactly. k and v [B,H,n,D] are held as they are, never written to."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        # They stay where they are, often in the prefill: two segments cost less than copying a whole cache.
        self._start = (k, v)
        self._new_k, self._new_v = (TokenBuffer(x[:, :, :0], axis=2) for x in self._start)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._new_k.append(k)
        self._new_v.append(v)
        return ops.attend(q, [self._start, (self._new_k.view, self._new_v.view)], scaling)

    def nbytes(self) -> Bytes:
        return Bytes(sum(x.nbytes for x in self._start) + self._new_k.nbytes() + self._new_v.nbytes(), 0)


class LayeredCache(DecodeCache):
    """A cache that decodes layer by layer; what fills `layers` is left to `ingest` and `complete`."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerState] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        return self.layers[layer].attend(q, k, v, scaling)

    def reserve(self, tokens: int) -> None:
        for state in self.layers.values():
            state.reserve(tokens)

    @property
    def steady(self) -> bool:
        return all(isinstance(state, SteadyState) and state.capturable for state in self.layers.values())

    def make_room(self) -> bool:
        moved = [cast("SteadyState", state).make_room() for state in self.layers.values()]
        return any(moved)

    @property
    def rearranges(self) -> bool:
        return any(cast("SteadyState", state).rearranges for state in self.layers.values())

    def rearrange(self) -> None:
        for state in self.layers.values():
            cast("SteadyState", state).rearrange()

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        return cast("SteadyState", self.layers[layer]).run(q, k, v, scaling)

    def resident_chunks(self) -> Sequence[Tensor]:
        found = [state.resident_chunks for state in self.layers.values()]
        return [numbers for numbers in found if numbers is not None]

    def chunk_numbers(self) -> Sequence[Tensor]:
        found = [state.chunk_numbers for state in self.layers.values()]
        return [numbers for numbers in found if numbers is not None]

    def nbytes(self) -> Bytes:
        return sum((state.nbytes() for state in self.layers.values()), Bytes(0, 0))

    def close(self) -> None:
        self.layers.clear()


class LayerwiseCache(LayeredCache):
    """A cache whose layers the method builds one by one, each from its own `LayerKV`."""

    def __init__(self, method: LayerwiseMethod, rope: Rope) -> None:
        super().__init__()
        self._method = method
        self._rope = rope

    def ingest(self, layer: int, kv: LayerKV) -> None:
        state = self._method.new_layer(layer, kv, self._rope)
        # A prompt that nobody else keeps must not be kept by a view of a few of its tokens.
        self.layers[layer] = state if kv.shared else owned(state)

    @classmethod
    def join(cls, rows: list[Self]) -> Sequence[DecodeCache]:
        # Rows that differ in shape are copied one by one, so that they too let go of their prefill.
        together = [rows] if can_stack([row.layers for row in rows]) else [[row] for row in rows]
        joined = [cls(group[0]._method, group[0]._rope) for group in together]
        for cache, group in zip(joined, together, strict=True):
            cache.layers = stack([row.layers for row in group])
        return joined

    def pick(self, rows: list[int]) -> DecodeCache:
        picked = type(self)(self._method, self._rope)
        picked.layers = pick(self.layers, rows)
        return picked


class LayerwiseMethod(Method):
    """A method whose layers are independent."""

    @abstractmethod
    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        """Build this layer's state from its dense keys and values."""

    def new_state(self, rope: Rope) -> DecodeCache:
        return LayerwiseCache(self, rope)


@dataclass(frozen=True)
class EvictingMethod(LayerwiseMethod):
    """A method that holds `budget` tokens and forgets the others; memory does not grow with the prompt."""

    budget: int = 2048

    def bytes_per_token(self, dims: Dims) -> Bytes:
        return Bytes(0, 0)

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        return {"keys and values": Bytes(min(tokens, self.budget) * dims.full_bytes_per_token, 0)}

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        return min(tokens + later, self.budget)

    @property
    def least_budget(self) -> int:
        """The smallest budget that goes with the other parameters."""
        return 1

    def with_kv_bytes(self, dims: Dims, tokens: int, kv_bytes: int) -> Method:
        low = self.least_budget
        return largest_within(lambda n: replace(self, budget=n), low, max(tokens, low), dims, tokens, kv_bytes)
