"""Which chosen chunks are in a slot already, and which free slots take the others: one program per head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.kernels.launch import padded

_TILE = 32


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
