"""The best chunks of each head, by a search for the score that just so many reach: no sort, no atomics. Then which of
them are in a slot already, and which free slots take the others: one program per head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.kernels.launch import padded, readable_columns

_LARGEST_BLOCK, _STEP, _TILE = 16384, 2048, 32  # 32 and 4 scores a thread
_LEAST = tl.constexpr(-(2**31))
_NONE = tl.constexpr(-0x7F800000)  # -inf, as `ordered` has it


@triton.jit
def ordered(scores, offsets, chunks, readable):
    """A block of scores as integers that order as they do; where there is no chunk, those of -inf."""
    x = tl.load(scores + offsets, mask=offsets < readable, other=float("-inf"))
    bits = x.to(tl.int32, bitcast=True)  # sign and magnitude: -0 becomes 0
    return tl.where(offsets < chunks, tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits), _NONE)


@triton.jit
def reaching(block, scores, trial, chunks, readable, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """How many chunks have `trial` at least. `block` are the first ones: where those are all, nothing is read again."""
    count = tl.sum((block >= trial).to(tl.int32), axis=0)
    if not WHOLE:
        for first in range(BLOCK, chunks, BLOCK):
            more = ordered(scores, first + tl.arange(0, BLOCK), chunks, readable)
            count += tl.sum((more >= trial).to(tl.int32), axis=0)
    return count


@triton.jit
def select_chunks(
    scores,
    numbers,
    chosen,
    chunks,
    readable,
    slots,
    scores_b,
    scores_h,
    numbers_b,
    numbers_h,
    heads,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores += (row // heads) * scores_b + (row % heads) * scores_h
    numbers += (row // heads) * numbers_b + (row % heads) * numbers_h
    chosen += row * slots
    block = ordered(scores, tl.arange(0, BLOCK), chunks, readable)
    there = reaching(block, scores, _NONE + 1, chunks, readable, BLOCK, WHOLE)
    positive = reaching(block, scores, 0, chunks, readable, BLOCK, WHOLE)
    wanted = tl.minimum(there, slots)
    # The largest number that as many reach: its sign first, then bit after bit while enough of them reach it. Once just
    # as many do, the bits left make no difference.
    threshold = tl.where(positive >= wanted, 0, _LEAST)
    reached = tl.where(positive >= wanted, positive, chunks + 1)
    bit = 30
    while (bit >= 0) & (reached != wanted):
        trial = threshold | (1 << bit)
        count = reaching(block, scores, trial, chunks, readable, BLOCK, WHOLE)
        threshold = tl.where(count >= wanted, trial, threshold)
        reached = tl.where(count >= wanted, count, reached)
        bit -= 1
    ties_wanted = wanted - reaching(block, scores, threshold + 1, chunks, readable, BLOCK, WHOLE)
    above = 0
    ties = 0
    # Few at a time, read once more: what comes of each takes more registers than the scores.
    offsets = tl.arange(0, STEP)
    for first in range(0, chunks, STEP):
        x = ordered(scores, first + offsets, chunks, readable)
        over, tie = x > threshold, x == threshold
        # Both counted at once, in 16 bits each.
        counted = over.to(tl.int32) + (tie.to(tl.int32) << 16)
        until = tl.cumsum(counted, axis=0)
        ties_until = ties + (until >> 16)
        kept = over | (tie & (ties_until <= ties_wanted))
        place = above + (until & 0xFFFF) + tl.minimum(ties_until, ties_wanted) - 1
        number = tl.load(numbers + first + offsets, mask=kept, other=-1)
        tl.store(chosen + place, number, mask=kept)
        total = tl.sum(counted, axis=0)
        above += total & 0xFFFF
        ties += total >> 16
    for first in range(0, slots, STEP):
        tl.store(chosen + first + offsets, -1, mask=(first + offsets >= wanted) & (first + offsets < slots))


@ranged("selection")
def choose_chunks(scores: Tensor, numbers: Tensor, slots: int) -> Tensor:
    """See `shadowkv.kernels.slots.choose_chunks`."""
    batch, heads, chunks = scores.shape
    scores = scores if scores.stride(2) == 1 else scores.contiguous()
    chosen = torch.empty(batch, heads, slots, dtype=torch.int32, device=scores.device)
    block = min(padded(chunks), _LARGEST_BLOCK)
    select_chunks[(batch * heads,)](
        scores, numbers, chosen, chunks, readable_columns(scores), slots, *scores.stride()[:2], *numbers.stride()[:2],
        heads, BLOCK=block, WHOLE=chunks <= block, STEP=min(block, _STEP), num_warps=16 if block >= 4096 else 4,
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
