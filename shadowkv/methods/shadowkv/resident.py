"""The fast engine of ShadowKV: a batch at a time, and what a step needs again stays on the device.

Equal to the reference in `method.py`: the same chunks are chosen and the same keys rebuilt from the
same factors, only that a chunk chosen again is found in its slot. A step is a fixed sequence of operations on tensors
of fixed shapes (`run`), so that it can be captured in a CUDA graph; what changes shapes or places happens before it,
on lengths that the host knows (`make_room`).

Different from the authors' fast path (their `ShadowKVCache_CPU`): every resident key is a rebuilt one, also after the
prompt, so results do not depend on the history of hits; resident chunks are indexed instead of moved; values are read
straight from pinned memory by the kernel that decodes and places them, on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.anatomy.rotary_table import RotaryTable, rotary_table
from shadowkv.common.dims import Bytes
from shadowkv.contract.layerwise import SteadyState
from shadowkv.contract.method import LayerKV
from shadowkv.kernels import slots
from shadowkv.kernels.operations import operations
from shadowkv.kernels.slots import Factors
from shadowkv.methods.shadowkv.divided import divide, pre_rope
from shadowkv.methods.shadowkv.settings import ShadowKVSettings
from shadowkv.methods.shadowkv.tails import Place, RowTail, Tails
from shadowkv.tensors.ragged import RaggedBuffer, Rows
from shadowkv.tensors.stored import CODINGS, Stored
from shadowkv.tensors.streams import beside

_PIECES = {"cuda": 2}

# Columns of `spans`: see `shadowkv.kernels.slots.attend_resident`.
_SLOTS, _OUTLIERS, _START, _LENGTH = range(4)


class ResidentLayer(SteadyState):
    """One layer of a batch whose rows may have prompts of different lengths."""

    def __init__(self, method: ShadowKVSettings, layer: int, kv: LayerKV, rope: Rope) -> None:
        self._method, self._layer, self._rope = method, layer, rope
        prompt = divide(method, layer, kv, rope, offload=False)  # values move once, to where there is room
        regions, chunk, room = method.regions, method.chunk, method.room_tokens(False)
        batch, heads, tokens, head_dim = kv.k.shape
        context = method.context_tokens(tokens)
        self._factors = prompt.factors.emptied()
        self._coefficients = tuple(RaggedBuffer(part, 1, room) for part in prompt.factors.parts)
        offload = method.offload == "host"
        room_of_values = method.room_tokens(offload)
        self._values = tuple(
            RaggedBuffer(part, 2, room_of_values, on_host=offload) for part in prompt.values.stored.parts
        )
        self._means = RaggedBuffer(prompt.landmarks.means.view, 2, room // chunk)
        self._numbers = RaggedBuffer(prompt.landmarks.numbers.view, 2, room // chunk)

        outliers, tail = prompt.outlier_k.shape[2], tokens - context
        ring = regions.slots + regions.outliers
        self._k, self._v = (kv.k.new_empty(batch, heads, regions.tokens, head_dim) for _ in range(2))
        for held, exact, newest in (
            (self._k, prompt.outlier_k, prompt.tail_k),
            (self._v, prompt.outlier_v, prompt.tail_v),
        ):
            held[:, :, regions.slots : regions.slots + outliers] = exact
            held[:, :, ring : ring + tail] = newest
        places, device = regions.slots // chunk, kv.k.device
        self._held = torch.full((batch, heads, places), -1, dtype=torch.int32, device=device)
        landmarks = len(prompt.landmarks)
        start = [min(landmarks, places) * chunk, outliers, 0, tail]
        self._spans = torch.tensor([start] * batch, dtype=torch.int32, device=device)
        self._counts = torch.full((batch,), landmarks, dtype=torch.int32, device=device)
        self._tails = Tails([RowTail(context, landmarks, tail)] * batch, chunk, method.window, regions.ring)

    def reserve(self, tokens: int) -> None:
        context, landmarks = self._tails.most_after(tokens)
        for buffer in (*self._coefficients, *self._values):
            buffer.reserve(context, spare=0)
        for buffer in (self._means, self._numbers):
            buffer.reserve(landmarks, spare=0)

    def make_room(self) -> bool:
        if not self._tails.append():
            return False
        # Rows at the same place go together: all of them, if their prompts were equally long.
        moving, batch = self._tails.moving(), self._k.shape[0]
        moved = [
            self._chunk_oldest(rows if len(rows) < batch else slice(None), after) for after, rows in moving.items()
        ]
        return any(moved)

    def run(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        batch, kernels = q.shape[0], operations(q.device)
        self._put_in_ring(k, v)
        # The values of one piece of the batch cross the bus while others choose, rebuild or attend.
        count = pieces(batch, q.device.type)
        parts = [slice(batch * n // count, batch * (n + 1) // count) for n in range(count)]
        placed = [self._place(rows, q[rows], scaling) for rows in parts] if self._means.tokens else []
        attended = []
        for number, rows in enumerate(parts):
            if placed:
                fill, values_are_there = placed[number]
                factors, held = self._key_factors(rows), self._held[rows]
                kernels.fill_keys(factors, self._rotary(q), held, fill, self._method.chunk, self._k[rows])
                values_are_there()
            # Right here, or it would queue behind the wait for values that it does not read.
            buffers = self._k[rows], self._v[rows], self._spans[rows]
            attended.append(kernels.attend_resident(q[rows], *buffers, self._method.regions, scaling))
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    def _place(self, rows: slice, q: Tensor, scaling: float) -> tuple[Tensor, Callable[[], None]]:
        """Choose chunks, give them slots and have their values fetched: slots to fill, and a wait for the values."""
        kernels, held = operations(q.device), self._held[rows]
        scores = kernels.chunk_scores(q, self._means.data[rows], scaling, self._counts[rows])
        chosen = kernels.choose_chunks(scores, self._numbers.data[rows], held.shape[2])
        fill = kernels.plan_fill(chosen, held)
        stored = Stored(self._method.values, tuple(part.data[rows] for part in self._values))
        with beside(q.device, first=True) as wait:
            fill_values = kernels.fill_values if self.capturable else slots.fill_values
            fill_values(stored, held, fill, self._method.chunk, self._v[rows])
        return fill, wait

    @property
    def capturable(self) -> bool:
        # Values in memory that could not be pinned are copied by the host, which has to know which ones.
        return all(part.data.device == self._k.device or part.data.is_pinned() for part in self._values)

    def _put_in_ring(self, k: Tensor, v: Tensor) -> None:
        regions = self._method.regions
        first = regions.slots + regions.outliers
        place = first + (self._spans[:, _START] + self._spans[:, _LENGTH]) % regions.ring
        index = place.long()[:, None, None, None].expand(k.shape)
        self._k.scatter_(2, index, k)
        self._v.scatter_(2, index, v)
        self._spans[:, _LENGTH] += 1

    def _key_factors(self, rows: slice) -> Factors:
        coefficients, *scale = (part.data[rows] for part in self._coefficients)
        return Factors(coefficients, scale[0] if scale else None, self._factors.vectors[rows])

    def _rotary(self, like: Tensor) -> RotaryTable:
        longest, room = self._tails.most_tokens, self._coefficients[0].tokens
        return rotary_table(self._rope, self._layer, like.shape[-1], room, longest, like)

    def _chunk_oldest(self, rows: Rows, after: Place) -> bool:
        """Move the oldest chunk of these rows' tails, all at the same place, into the context."""
        method, regions, chunk = self._method, self._method.regions, self._method.chunk
        context, landmark = after.context_tokens - chunk, after.landmarks - 1
        oldest = after.ring_start - chunk
        ring = torch.arange(oldest, oldest + chunk, device=self._k.device) % regions.ring
        keys, values = (x[:, :, regions.slots + regions.outliers + ring][rows] for x in (self._k, self._v))
        length = context + chunk + after.ring_tokens + 1
        before = pre_rope(self._rope, self._layer, keys, context, length)
        mean = keys.float().mean(dim=2, keepdim=True).to(keys.dtype)
        held = (*self._coefficients, *self._values)
        new = (*self._factors.encode(before, rows), *CODINGS[method.values].encode(values))
        number = torch.full_like(mean[..., 0], context // chunk, dtype=torch.int32)
        moved = [
            *(buffer.put(rows, context, x) for buffer, x in zip(held, new, strict=True)),
            self._means.put(rows, landmark, mean),
            self._numbers.put(rows, landmark, number),
        ]
        self._spans[rows, _SLOTS] = min(after.landmarks * chunk, regions.slots)
        self._spans[rows, _START] = after.ring_start
        self._spans[rows, _LENGTH] = after.ring_tokens
        self._counts[rows] = after.landmarks
        return any(moved)

    @property
    def resident_chunks(self) -> Tensor:
        return self._held

    @property
    def chunk_numbers(self) -> Tensor:
        return self._numbers.data[:, :, : min(self._tails.landmarks())]

    def nbytes(self) -> Bytes:
        buffers = (*self._coefficients, self._means, self._numbers)
        tensors = (self._k, self._v, self._held, self._spans, self._counts)
        device = self._factors.nbytes() + sum(b.nbytes() for b in buffers) + sum(x.nbytes for x in tensors)
        values = sum(b.nbytes() for b in self._values)
        return Bytes(device, values) if self._method.offload == "host" else Bytes(device + values, 0)


def pieces(batch: int, device_type: str) -> int:
    """Pieces that a step divides a batch into."""
    return min(batch, _PIECES.get(device_type, 1))
