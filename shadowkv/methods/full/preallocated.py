"""Full attention over buffers with room to grow: one flash-decoding kernel per step, whatever the rows' lengths are."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv.common.dims import Bytes
from shadowkv.contract.layerwise import SteadyState
from shadowkv.kernels.operations import operations
from shadowkv.kernels.slots import Regions
from shadowkv.tensors import ops
from shadowkv.tensors.ragged import BatchLengths, RaggedBuffer

ROOM_TOKENS = 128  # for generated tokens, before buffers grow: on a GPU copying them is cheaper than their room


class PreallocatedLayer(SteadyState):
    """Keys and values of a batch whose rows may differ in length. k and v [B,H,n,D] are copied."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self._k, self._v = (RaggedBuffer(x, 2, ROOM_TOKENS) for x in (k, v))
        batch, tokens = k.shape[0], k.shape[2]
        # Everything is one ring that starts at 0 and never comes around: see `shadowkv.kernels.slots.attend_resident`.
        self._spans = torch.tensor([[0, 0, 0, tokens]] * batch, dtype=torch.int32, device=k.device)
        self._lengths = BatchLengths([tokens] * batch)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        held = set(self._lengths.rows)
        if q.shape[2] == 1 or len(held) > 1:
            return super().attend(q, k, v, scaling)
        # A second turn of rows of equal length: all its tokens at once.
        first, count = held.pop(), q.shape[2]
        for buffer, new in ((self._k, k), (self._v, v)):
            buffer.reserve(first + count)
            buffer.data[:, :, first : first + count] = new
        self._spans[:, 3] += count
        self._lengths.append(count)
        return ops.attend(q, [(self._k.data[:, :, : first + count], self._v.data[:, :, : first + count])], scaling)

    def reserve(self, tokens: int) -> None:
        for buffer in (self._k, self._v):
            buffer.reserve(self._lengths.most + tokens, spare=0)

    def make_room(self) -> bool:
        needed = self._lengths.most + 1
        moved = [buffer.reserve(needed) for buffer in (self._k, self._v)]
        self._lengths.append()
        return any(moved)

    def run(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        place = self._spans[:, 3].long()[:, None, None, None].expand(k.shape)
        self._k.data.scatter_(2, place, k)
        self._v.data.scatter_(2, place, v)
        self._spans[:, 3] += 1
        regions, attend = Regions(0, 0, self._k.tokens), operations(q.device).attend_resident
        out: Tensor = attend(q, self._k.data, self._v.data, self._spans, regions, scaling)
        return out

    def nbytes(self) -> Bytes:
        return Bytes(self._k.nbytes() + self._v.nbytes() + self._spans.nbytes, 0)
