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
from shadowkv.tensors.stored import CODINGS, Stored

ROOM_TOKENS = 128  # for generated tokens, before buffers grow: on a GPU copying them is cheaper than their room


class PreallocatedLayer(SteadyState):
    """Keys and values of a batch whose rows may differ in length, as they come or in 8 bits.

    k and v [B,H,n,D] are copied. coding: native, int8 or fp8 of `shadowkv.tensors.stored`.
    """

    def __init__(self, k: Tensor, v: Tensor, coding: str = "native") -> None:
        self._coding = coding
        self._k, self._v = (
            tuple(RaggedBuffer(part, 2, ROOM_TOKENS) for part in CODINGS[coding].encode(x)) for x in (k, v)
        )
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
        for buffer, new in self._parts(k, v):
            buffer.reserve(first + count)
            buffer.data[:, :, first : first + count] = new
        self._spans[:, 3] += count
        self._lengths.append(count)
        decode = CODINGS[self._coding].decode
        keys, values = (
            decode(*(part.data[:, :, : first + count] for part in held)).to(q.dtype) for held in (self._k, self._v)
        )
        return ops.attend(q, [(keys, values)], scaling)

    def reserve(self, tokens: int) -> None:
        for buffer in (*self._k, *self._v):
            buffer.reserve(self._lengths.most + tokens, spare=0)

    def make_room(self) -> bool:
        needed = self._lengths.most + 1
        moved = [buffer.reserve(needed) for buffer in (*self._k, *self._v)]
        self._lengths.append()
        return any(moved)

    def run(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        place = self._spans[:, 3].long()[:, None, None, None]
        for buffer, new in self._parts(k, v):
            buffer.data.scatter_(2, place.expand(new.shape), new)
        self._spans[:, 3] += 1
        kernels = operations(q.device)
        k_held, v_held = (tuple(part.data for part in held) for held in (self._k, self._v))
        out: Tensor
        if self._coding == "native":
            regions = Regions(0, 0, self._k[0].tokens)
            out = kernels.attend_resident(q, *k_held, *v_held, self._spans, regions, scaling)
        else:
            stored = [Stored(self._coding, held) for held in (k_held, v_held)]
            out = kernels.attend_codes(q, *stored, self._spans[:, 3], scaling)
        return out

    def _parts(self, k: Tensor, v: Tensor) -> list[tuple[RaggedBuffer, Tensor]]:
        """What is to be written of new keys and values, and where."""
        encode = CODINGS[self._coding].encode
        return [*zip(self._k, encode(k), strict=True), *zip(self._v, encode(v), strict=True)]

    def nbytes(self) -> Bytes:
        return Bytes(sum(part.nbytes() for part in (*self._k, *self._v)) + self._spans.nbytes, 0)
