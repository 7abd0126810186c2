"""The best chunks of each head by a search for the score that just so many reach: no sort, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowkv.common.ranges import ranged

_LARGEST_BLOCK = 8192
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
