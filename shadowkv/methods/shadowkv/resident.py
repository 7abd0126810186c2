"""The fast engine of ShadowKV: a batch at a time, and what a step needs again stays on the device.

Equal to the reference in `method.py`: the same chunks are chosen and the same keys rebuilt from the
same factors, only that a chunk chosen again is found in its slot. A step is a fixed sequence of operations on tensors
of fixed shapes (`run`), so that it can be captured in a CUDA graph; so is what moves full chunks of generated tokens
into the context before some steps (`rearrange`). What needs larger tensors happens before both, on lengths that the
host counts by itself (`make_room`).

Different from the authors' fast path (their `ShadowKVCache_CPU`): every resident key is a rebuilt one, also after the
prompt, so results do not depend on the history of hits; resident chunks are indexed instead of moved; values are read
straight from pinned memory by the kernel that decodes and places them, on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
from shadowkv.methods.shadowkv.divided import divide, pre_rope_at
from shadowkv.methods.shadowkv.pieces import pieces
from shadowkv.methods.shadowkv.settings import HIT_RATE, ShadowKVSettings
from shadowkv.methods.shadowkv.tails import RowTail, Tails
from shadowkv.tensors.pinned import HostRows, empty_beside, empty_on_host
from shadowkv.tensors.ragged import Empty, RaggedBuffer
from shadowkv.tensors.stored import CODINGS, Stored
from shadowkv.tensors.streams import beside

# Columns of `spans`: see `shadowkv.kernels.slots.attend_resident`.
_SLOTS, _OUTLIERS, _START, _LENGTH = range(4)
_CONTEXT, _ROOM = range(2)


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
            RaggedBuffer(part, 2, room_of_values, self._place_of_values(kv.host_rows, number))
            for number, part in enumerate(prompt.values.stored.parts)
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
        # Where the next chunk goes, and the tokens of the tail beyond which its oldest one has to: int32 [B,2].
        self._places = torch.tensor([[context, tail + method.window]] * batch, dtype=torch.int32, device=device)
        self._tails = Tails([RowTail(context, landmarks, tail)] * batch, chunk, method.window)

    def reserve(self, tokens: int) -> None:
        context, landmarks = self._tails.most_after(tokens)
        for buffer in (*self._coefficients, *self._values):
            buffer.reserve(context, spare=0)
        for buffer in (self._means, self._numbers):
            buffer.reserve(landmarks, spare=0)

    def _place_of_values(self, batch: HostRows | None, part: int) -> Empty:
        if self._method.offload != "host":
            return empty_beside
        return empty_on_host if batch is None else partial(batch.empty, (self._layer, part))

    def make_room(self) -> bool:
        self._tails.append()
        if not self._tails.due:
            return False
        tokens, chunks = (*self._coefficients, *self._values), (self._means, self._numbers)
        room = min(buffer.tokens for buffer in tokens), min(buffer.tokens for buffer in chunks)
        if not self._tails.outgrew(*room):
            return False
        context, landmarks = self._tails.most_after(0)
        grown = [buffer.reserve(context) for buffer in tokens] + [buffer.reserve(landmarks) for buffer in chunks]
        return any(grown)

    @property
    def rearranges(self) -> bool:
        return self._tails.due

    def rearrange(self) -> None:
        """Move the oldest chunk of every tail that is full into the context: places are the device's own numbers."""
        regions, chunk = self._method.regions, self._method.chunk
        start, length = self._spans[:, _START], self._spans[:, _LENGTH]
        full = length + 1 >= self._places[:, _ROOM] + chunk
        offsets = torch.arange(chunk, device=full.device)
        oldest = (start[:, None] + offsets) % regions.ring + regions.slots + regions.outliers
        index = oldest[:, None, :, None].expand(*self._k.shape[:2], chunk, self._k.shape[-1])
        keys, values = (held.gather(2, index) for held in (self._k, self._v))
        # Rows that are not full read and write their first tokens as they are: those are there whatever they hold.
        places = torch.where(full, self._places[:, _CONTEXT], 0)[:, None] + offsets
        landmark = torch.where(full, self._counts, 0)[:, None].long()
        before = pre_rope_at(self._rope, self._layer, keys, places[:, None], self._table_tokens)
        new = (*self._factors.encode(before), *CODINGS[self._method.values].encode(values))
        for buffer, x in zip((*self._coefficients, *self._values), new, strict=True):
            buffer.put(places, x, full)
        mean = keys.float().mean(dim=2, keepdim=True).to(keys.dtype)
        self._means.put(landmark, mean, full)
        number = (places[:, :1] // chunk).int()[:, None].expand(mean.shape[:3])
        self._numbers.put(landmark, number, full)
        gone = full.int()
        self._counts += gone
        self._places[:, _CONTEXT] += gone * chunk
        self._spans[:, _SLOTS] = (self._counts * chunk).clamp(max=regions.slots)
        self._spans[:, _START] = (start + gone * chunk) % regions.ring
        self._spans[:, _LENGTH] -= gone * chunk

    @property
    def _table_tokens(self) -> int:
        """A length that a table of the context's positions has, by the frequencies of the longest row."""
        room, crossing = self._coefficients[0].tokens, self._rope.crossing(self._layer)
        if crossing is None:
            return room
        return min(room, crossing) if self._tails.most_tokens <= crossing else max(room, crossing + 1)

    def run(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        batch, kernels = q.shape[0], operations(q.device)
        self._put_in_ring(k, v)
        # The values of one piece of the batch cross the bus while others choose, rebuild or attend.
        count = self._pieces(batch)
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

    def _pieces(self, batch: int) -> int:
        return pieces(batch, self.fetched_bytes) if self._k.device.type == "cuda" else 1

    @property
    def fetched_bytes(self) -> float:
        """What a step of one row is taken to bring over the bus."""
        if self._method.offload != "host":
            return 0
        token_bytes = sum(part.data[0, :, 0].nbytes for part in self._values)
        return (1 - HIT_RATE) * self._method.budget * token_bytes

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

    @property
    def resident_chunks(self) -> Tensor:
        return self._held

    @property
    def chunk_numbers(self) -> Tensor:
        return self._numbers.data[:, :, : min(self._tails.landmarks())]

    def nbytes(self) -> Bytes:
        buffers = (*self._coefficients, self._means, self._numbers)
        tensors = (self._k, self._v, self._held, self._spans, self._counts, self._places)
        device = self._factors.nbytes() + sum(b.nbytes() for b in buffers) + sum(x.nbytes for x in tensors)
        values = sum(b.nbytes() for b in self._values)
        return Bytes(device, values) if self._method.offload == "host" else Bytes(device + values, 0)
