"""The best chunks of each head, by a search for the score that just so many reach: no sort, no atomics. Then which of
them are in a slot already, and which free slots take the others: one program per head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.kernels.launch import padded

_LARGEST_BLOCK, _TILE = 8192, 32
_LEAST = tl.constexpr(-(2**31))
_NONE = tl.constexpr(-0x7F800000)  # -inf, as `ordered` has it


@triton.jit
def ordered(scores, first, offsets, chunks):
    """A block of scores as integers that order as they do; where there is no chunk, those of -inf."""
    x = tl.load(scores + first + offsets, mask=first + offsets < chunks, other=float("-inf"))
    bits = x.to(tl.int32, bitcast=True)  # sign and magnitude: -0 becomes 0
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def select_chunks(scores, numbers, chosen, chunks, slots, stride_b, stride_h, heads, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * chunks
    numbers += (row // heads) * stride_b + (row % heads) * stride_h
    chosen += row * slots
    offsets = tl.arange(0, BLOCK)
    there = 0
    positive = 0
    for first in range(0, chunks, BLOCK):
        x = ordered(scores, first, offsets, chunks)
        there += tl.sum((x > _NONE).to(tl.int32), axis=0)
        positive += tl.sum((x >= 0).to(tl.int32), axis=0)
    wanted = tl.minimum(there, slots)
    # The largest number that as many reach: its sign first, then bit after bit while enough of them reach it.
    threshold = tl.where(positive >= wanted, 0, _LEAST)
    for step in range(31):
        trial = threshold | (1 << (30 - step))
        reached = 0
        for first in range(0, chunks, BLOCK):
            reached += tl.sum((ordered(scores, first, offsets, chunks) >= trial).to(tl.int32), axis=0)
        threshold = tl.where(reached >= wanted, trial, threshold)
    above = 0
    for first in range(0, chunks, BLOCK):
        above += tl.sum((ordered(scores, first, offsets, chunks) > threshold).to(tl.int32), axis=0)
    ties_wanted = wanted - above
    taken = 0
    ties = 0
    for first in range(0, chunks, BLOCK):
        x = ordered(scores, first, offsets, chunks)
        tie = (x == threshold).to(tl.int32)
        kept = (x > threshold) | ((tie == 1) & (ties + tl.cumsum(tie, axis=0) <= ties_wanted))
        counted = kept.to(tl.int32)
        place = taken + tl.cumsum(counted, axis=0) - 1
        number = tl.load(numbers + first + offsets, mask=kept, other=-1)
        tl.store(chosen + place, number, mask=kept)
        taken += tl.sum(counted, axis=0)
        ties += tl.sum(tie, axis=0)
    for first in range(0, slots, BLOCK):
        tl.store(chosen + first + offsets, -1, mask=(first + offsets >= wanted) & (first + offsets < slots))


@ranged("selection")
def choose_chunks(scores: Tensor, numbers: Tensor, slots: int) -> Tensor:
    """See `shadowkv.kernels.slots.choose_chunks`."""
    batch, heads, chunks = scores.shape
    chosen = torch.empty(batch, heads, slots, dtype=torch.int32, device=scores.device)
    block = min(max(triton.next_power_of_2(chunks), 16), _LARGEST_BLOCK)
    select_chunks[(batch * heads,)](
        scores.contiguous(), numbers, chosen, chunks, slots, numbers.stride(0), numbers.stride(1), heads,
        BLOCK=block, num_warps=16 if block >= 4096 else 4,
    )  # fmt: skip
    return chosen


@triton.jit
def assign_slots(chosen, held, fill, slots, heads, stride_b, stride_h, SLOTS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chosen += row * slots
    fill += row * slots
    held += (row // heads) * stride_b + (row % heads) * stride_h
    j = tl.arange(0, SLOTS)
    t = tl.arange(0, TILE)
    before = tl.load(held + j, mask=j < slots, other=-1)
    in_use = 0
    hit = tl.zeros((SLOTS,), tl.int32)
    for first in range(0, slots, TILE):
        c = tl.load(chosen + first + t, mask=first + t < slots, other=-1)
        in_use += tl.sum((c >= 0).to(tl.int32), axis=0)
        same = ((c[:, None] == before[None, :]) & (c[:, None] >= 0)).to(tl.int32)
        hit = tl.maximum(hit, tl.max(same, axis=0))
    free = ((hit == 0) & (j < in_use)).to(tl.int32)
    place = tl.cumsum(free, axis=0) - 1  # which of the free slots this is
    after = before
    missed = 0
    for first in range(0, slots, TILE):
        c = tl.load(chosen + first + t, mask=first + t < slots, other=-1)
        same = ((c[:, None] == before[None, :]) & (c[:, None] >= 0)).to(tl.int32)
        miss = ((tl.max(same, axis=1) == 0) & (c >= 0)).to(tl.int32)
        rank = missed + tl.cumsum(miss, axis=0) - 1
        # The miss of some rank goes to the free slot of the same place: at most one per slot.
        enters = (miss[:, None] == 1) & (free[None, :] == 1) & (rank[:, None] == place[None, :])
        entering = tl.max(tl.where(enters, c[:, None], -1), axis=0)
        after = tl.where(entering >= 0, entering, after)
        missed += tl.sum(miss, axis=0)
    tl.store(held + j, after, mask=j < slots)
    tl.store(fill + place, j, mask=(free == 1) & (place < missed))
    tl.store(fill + j, -1, mask=(j >= missed) & (j < slots))


@ranged("selection")
def plan_fill(chosen: Tensor, held: Tensor) -> Tensor:
    """See `shadowkv.kernels.slots.plan_fill`."""
    batch, heads, slots = held.shape
    fill = torch.empty_like(chosen)
    assign_slots[(batch * heads,)](
        chosen, held, fill, slots, heads, held.stride(0), held.stride(1), SLOTS=padded(slots), TILE=_TILE
    )
    return fill
