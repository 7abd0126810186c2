"""Attention of one token per row to the positions in use, in parallel over stretches of them (flash decoding)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.kernels.backend import interpreted
from shadowkv.kernels.launch import (
    blocks_each,
    check_head_dim,
    load_queries,
    padded,
    product,
    programs_at_once,
    rows_of,
)
from shadowkv.kernels.slots import Regions

_MOST_SPLITS, _LARGEST_JOIN = 128, 2**14  # of more elements `join_stretches` does not hold all in registers


@triton.jit
def nothing_absorbed(GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The running softmax of no position: largest score, sum of weights, weighted values."""
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    return largest, tl.zeros((GROUP,), tl.float32), tl.zeros((GROUP, HEAD_DIM), tl.float32)


@triton.jit
def absorb(
    asked,
    k,
    v,
    at,
    used,
    known,
    scaling,
    largest,
    total,
    held,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Take a block of keys and values, of which those `used` count, into a running softmax."""
    there = used[:, None] & known[None, :]
    keys = tl.load(k + at, mask=there, other=0.0)
    z = product(asked, tl.trans(keys), tl.zeros((GROUP, BLOCK), tl.float32), INTERPRETED) * scaling
    z = tl.where(used[None, :], z, float("-inf"))
    higher = tl.maximum(largest, tl.max(z, axis=1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp(z - safe[:, None])
    shrink = tl.exp(largest - safe)
    values = tl.load(v + at, mask=there, other=0.0)
    total = total * shrink + tl.sum(weights, axis=1)
    held = product(weights.to(values.dtype), values, held * shrink[:, None], INTERPRETED)
    return higher, total, held


@triton.jit
def keep_stretch(part, part_max, part_sum, largest, total, held, row, split, group, head_dim, g, d):
    """Write a stretch's running softmax to where `join_stretches` reads it."""
    place = (row * tl.num_programs(1) + split) * group + g
    tl.store(part_max + place, largest, mask=g < group)
    tl.store(part_sum + place, total, mask=g < group)
    known = (g[:, None] < group) & (d[None, :] < head_dim)
    tl.store(part + place[:, None] * head_dim + d[None, :], held, mask=known)


@triton.jit
def attend_stretch(
    q,
    k,
    v,
    spans,
    part,
    part_max,
    part_sum,
    scaling,
    heads,
    group,
    head_dim,
    slots,
    outliers,
    ring,
    stretch,
    k_b,
    k_h,
    v_b,
    v_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, head = row // heads, row % heads
    in_slots, of_outliers = tl.load(spans + batch * 4), tl.load(spans + batch * 4 + 1)
    start, length = tl.load(spans + batch * 4 + 2), tl.load(spans + batch * 4 + 3)
    g, d, n = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK)
    known = d < head_dim
    asked = load_queries(q, row, group, head_dim, g, d)
    largest, total, held = nothing_absorbed(GROUP, HEAD_DIM)
    end = tl.minimum((split + 1) * stretch, slots + outliers + ring)
    for first in range(split * stretch, end, BLOCK):
        position = first + n
        after, turn = position - slots, position - slots - outliers
        # Where the ring starts is below its size, so one turn back is enough.
        age = tl.where(turn >= start, turn - start, turn - start + ring)
        used = (
            (position < in_slots) | ((after >= 0) & (turn < 0) & (after < of_outliers)) | ((turn >= 0) & (age < length))
        )
        used = used & (position < end)
        at = position[:, None] * head_dim + d[None, :]
        largest, total, held = absorb(
            asked, k + batch * k_b + head * k_h, v + batch * v_b + head * v_h, at, used, known, scaling,
            largest, total, held, GROUP, BLOCK, INTERPRETED,
        )  # fmt: skip
    keep_stretch(part, part_max, part_sum, largest, total, held, row, split, group, head_dim, g, d)


@triton.jit
def join_stretches(
    part, part_max, part_sum, out, splits, group, head_dim, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)  # of batch x query heads
    row, g = head // group, head % group
    s, d = tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    place = (row * splits + s) * group + g
    peaks = tl.load(part_max + place, mask=s < splits, other=float("-inf"))
    weights = tl.exp(peaks - tl.max(peaks, axis=0))
    total = tl.sum(weights * tl.load(part_sum + place, mask=s < splits, other=0.0), axis=0)
    known = (s[:, None] < splits) & (d[None, :] < head_dim)
    parts = tl.load(part + place[:, None] * head_dim + d[None, :], mask=known, other=0.0)
    answer = tl.sum(parts * weights[:, None], axis=0) / total
    tl.store(out + head * head_dim + d, answer.to(out.dtype.element_ty), mask=d < head_dim)


def block_of(head_dim: int) -> int:
    """Positions looked at together: keys, values and what is gathered of them are held in registers."""
    return 64 if head_dim <= 128 else 32


def program_bytes(head_dim: int, element_bytes: int) -> int:
    """Shared memory of a program, about: two blocks of keys and values, and some of what comes of them."""
    return 23 * block_of(head_dim) * padded(head_dim) * element_bytes // 5


class Stretches(NamedTuple):
    """Stretches of positions, one for each program, and what the programs leave of them for `join`."""

    tokens: int
    held: Tensor  # [rows, stretches, G, D] fp32
    largest: Tensor  # [rows, stretches, G] fp32
    total: Tensor

    @classmethod
    def of(
        cls, positions: int, rows: int, group: int, head_dim: int, device: torch.device, element_bytes: int = 2
    ) -> Stretches:
        """As many as keep a GPU evenly busy with so many rows."""
        block, width = block_of(head_dim), padded(head_dim)
        at_once = programs_at_once(program_bytes(head_dim, element_bytes), device)
        most = min(_MOST_SPLITS, _LARGEST_JOIN // width)
        tokens = blocks_each(triton.cdiv(positions, block), rows, at_once, most) * block
        splits = triton.cdiv(positions, tokens)
        held = torch.empty(rows, splits, group, head_dim, dtype=torch.float32, device=device)
        largest, total = torch.empty(2, rows, splits, group, dtype=torch.float32, device=device)
        return cls(tokens, held, largest, total)

    def join(self, out: Tensor) -> Tensor:
        """Write the softmax over all stretches to out [B,Hq,1,D]."""
        rows, splits, group, head_dim = self.held.shape
        join_stretches[(rows * group,)](
            self.held, self.largest, self.total, out, splits, group, head_dim,
            SPLITS=padded(splits, 1), HEAD_DIM=padded(head_dim),
        )  # fmt: skip
        return out


@ranged("attention")
def attend_resident(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, regions: Regions, scaling: float) -> Tensor:
    """See `shadowkv.kernels.slots.attend_resident`."""
    batch, q_heads, _, head_dim = q.shape
    check_head_dim(head_dim)
    heads = k.shape[1]
    group, rows = q_heads // heads, batch * heads
    stretches = Stretches.of(regions.tokens, rows, group, head_dim, q.device, k.element_size())
    attend_stretch[stretches.held.shape[:2]](
        q.contiguous(), k, v, spans.contiguous(), *stretches[1:], scaling, heads, group, head_dim, *regions,
        stretches.tokens, *rows_of(k, 2), *rows_of(v, 2), GROUP=padded(group), HEAD_DIM=padded(head_dim),
        BLOCK=block_of(head_dim), INTERPRETED=interpreted(),
    )  # fmt: skip
    return stretches.join(torch.empty_like(q, memory_format=torch.contiguous_format))
