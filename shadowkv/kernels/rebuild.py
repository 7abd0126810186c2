"""Keys of chunks that were missed: gather rows of coefficients, multiply, rotate, put into their slots.

Where the channels of a pair lie in one of the two usual ways, each half of every pair is a product of its own (or, of
neighbours, of what one thread holds), cos and sin are read once for both, and whatever is read lies side by side. For
any other way the partner that RoPE mixes a channel with is a second product of the same coefficients with another
column, read by index.

A few programs go over all tiles, most of which find nothing to fill.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from shadowkv.anatomy.rotary_table import RotaryTable
from shadowkv.common.ranges import ranged
from shadowkv.kernels.backend import interpreted
from shadowkv.kernels.launch import check_head_dim, padded, processors, product, rows_of
from shadowkv.kernels.slots import Factors

_BLOCK_RANK, _PROGRAMS_PER_PROCESSOR = 32, 2


@triton.jit
def tile_to_fill(held, fill, slots, chunk, first, TOKENS: tl.constexpr):
    """Of a head's tokens to fill, TOKENS from `first` on: which there are, their positions, and where they go."""
    m = first + tl.arange(0, TOKENS)
    entry = m // chunk
    slot = tl.load(fill + entry, mask=entry < slots, other=-1)
    filled = slot >= 0
    number = tl.load(held + slot, mask=filled, other=0)
    return filled, number * chunk + m % chunk, slot * chunk + m % chunk


@triton.jit
def rows_of_rank(coefficients, token, filled, rank, k, like):
    """Columns k of the coefficients of some tokens, in the type of `like`."""
    x = tl.load(coefficients + token[:, None] * rank + k[None, :], mask=filled[:, None] & (k < rank)[None, :], other=0)
    return x.to(tl.float32).to(like.dtype.element_ty)  # by way of fp32 for the interpreter


@triton.jit
def rebuild_pairs(
    coefficients,
    scales,
    vectors,
    cos,
    sin,
    sign,
    held,
    fill,
    out,
    rows,
    heads,
    slots,
    chunk,
    rank,
    head_dim,
    coefficients_b,
    scales_b,
    vectors_b,
    held_b,
    held_h,
    out_b,
    out_h,
    CODED: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    width = heads * head_dim
    p, e, k = tl.arange(0, PAIR_BLOCK), tl.arange(0, REST_BLOCK), tl.arange(0, RANK)
    both = tl.arange(0, 2 * PAIR_BLOCK)
    tiles = tl.cdiv(slots * chunk, TOKENS)
    for item in range(tl.program_id(0), rows * tiles, tl.num_programs(0)):
        row, start = (item % rows).to(tl.int64), (item // rows) * TOKENS
        # Slots to fill come first in every row: where the first one is none, so are the others.
        if tl.load(fill + row * slots + start // chunk) >= 0:
            batch, head = row // heads, row % heads
            filled, token, place = tile_to_fill(
                held + batch * held_b + head * held_h, fill + row * slots, slots, chunk, start, TOKENS
            )
            left = tl.zeros((TOKENS, PAIR_BLOCK), tl.float32)
            right = tl.zeros((TOKENS, PAIR_BLOCK), tl.float32)
            beside = tl.zeros((TOKENS, 2 * PAIR_BLOCK), tl.float32)
            rest = tl.zeros((TOKENS, REST_BLOCK), tl.float32)
            for first in range(0, rank, RANK):
                x = rows_of_rank(coefficients + batch * coefficients_b, token, filled, rank, first + k, vectors)
                at = vectors + batch * vectors_b + (first + k[:, None]) * width + head * head_dim
                of_rank = (first + k < rank)[:, None]
                if PAIRS:
                    if NEIGHBOURS:
                        v = tl.load(at + both[None, :], mask=of_rank & (both < 2 * PAIRS)[None, :], other=0.0)
                        beside = product(x, v, beside, INTERPRETED)
                    else:
                        known = of_rank & (p < PAIRS)[None, :]
                        left = product(x, tl.load(at + p[None, :], mask=known, other=0.0), left, INTERPRETED)
                        v = tl.load(at + PAIRS + p[None, :], mask=known, other=0.0)
                        right = product(x, v, right, INTERPRETED)
                if REST:
                    v = tl.load(at + 2 * PAIRS + e[None, :], mask=of_rank & (e < REST)[None, :], other=0.0)
                    rest = product(x, v, rest, INTERPRETED)
            scale = tl.full((TOKENS,), 1.0, tl.float32)
            if CODED:
                scale = tl.load(scales + batch * scales_b + token, mask=filled, other=0.0).to(tl.float32)
            target = out + batch * out_b + head * out_h + place[:, None] * head_dim
            if PAIRS:
                known = filled[:, None] & (p < PAIRS)[None, :]
                angle = token[:, None] * PAIRS + p[None, :]
                c = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32) * scale[:, None]
                s = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32) * scale[:, None]
                if NEIGHBOURS:
                    left, right = tl.split(tl.reshape(beside, (TOKENS, PAIR_BLOCK, 2)))
                    signs = tl.load(sign + both, mask=both < 2 * PAIRS, other=0.0)
                    one, two = tl.split(tl.reshape(signs, (PAIR_BLOCK, 2)))
                else:
                    one = tl.load(sign + p, mask=p < PAIRS, other=0.0)
                    two = tl.load(sign + PAIRS + p, mask=p < PAIRS, other=0.0)
                a = (left * c + right * s * one[None, :]).to(out.dtype.element_ty)
                b = (right * c + left * s * two[None, :]).to(out.dtype.element_ty)
                if NEIGHBOURS:
                    key = tl.reshape(tl.join(a, b), (TOKENS, 2 * PAIR_BLOCK))
                    tl.store(target + both[None, :], key, mask=filled[:, None] & (both < 2 * PAIRS)[None, :])
                else:
                    tl.store(target + p[None, :], a, mask=known)
                    tl.store(target + PAIRS + p[None, :], b, mask=known)
            if REST:
                still = (rest * scale[:, None]).to(out.dtype.element_ty)
                tl.store(target + 2 * PAIRS + e[None, :], still, mask=filled[:, None] & (e < REST)[None, :])


@triton.jit
def rebuild_chunks(
    coefficients,
    scales,
    vectors,
    cos,
    sin,
    pair,
    partner,
    sign,
    held,
    fill,
    out,
    rows,
    heads,
    slots,
    chunk,
    rank,
    head_dim,
    pairs,
    coefficients_b,
    scales_b,
    vectors_b,
    held_b,
    held_h,
    out_b,
    out_h,
    CODED: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    width = heads * head_dim
    d, k = tl.arange(0, HEAD_DIM), tl.arange(0, RANK)
    known = d < head_dim
    tiles = tl.cdiv(slots * chunk, TOKENS)
    for item in range(tl.program_id(0), rows * tiles, tl.num_programs(0)):
        row, start = (item % rows).to(tl.int64), (item // rows) * TOKENS
        if tl.load(fill + row * slots + start // chunk) >= 0:
            batch, head = row // heads, row % heads
            filled, token, place = tile_to_fill(
                held + batch * held_b + head * held_h, fill + row * slots, slots, chunk, start, TOKENS
            )
            other = tl.load(partner + d, mask=known, other=0)
            own = tl.zeros((TOKENS, HEAD_DIM), tl.float32)
            mixed = tl.zeros((TOKENS, HEAD_DIM), tl.float32)
            for first in range(0, rank, RANK):
                x = rows_of_rank(coefficients + batch * coefficients_b, token, filled, rank, first + k, vectors)
                at = vectors + batch * vectors_b + (first + k[:, None]) * width + head * head_dim
                asked = (first + k < rank)[:, None] & known[None, :]
                own = product(x, tl.load(at + d[None, :], mask=asked, other=0.0), own, INTERPRETED)
                mixed = product(x, tl.load(at + other[None, :], mask=asked, other=0.0), mixed, INTERPRETED)
            if CODED:
                scale = tl.load(scales + batch * scales_b + token, mask=filled, other=0.0).to(tl.float32)
                own, mixed = own * scale[:, None], mixed * scale[:, None]
            turn = tl.load(sign + d, mask=known, other=0.0)
            angle = token[:, None] * pairs + tl.load(pair + d, mask=known, other=0)[None, :]
            rotated = filled[:, None] & (turn != 0.0)[None, :]
            c = tl.load(cos + angle, mask=rotated, other=1.0).to(tl.float32)
            s = tl.load(sin + angle, mask=rotated, other=0.0).to(tl.float32)
            key = own * c + mixed * s * turn[None, :]
            target = out + batch * out_b + head * out_h + place[:, None] * head_dim + d[None, :]
            tl.store(target, key.to(out.dtype.element_ty), mask=filled[:, None] & known[None, :])


def tokens_at_once(head_dim: int) -> int:
    """Tokens of one program of pairs, whose products are held in registers. Without pairs they are twice as many."""
    return 64 if head_dim <= 128 else 32


@ranged("rebuild")
def fill_keys(factors: Factors, rotary: RotaryTable, held: Tensor, fill: Tensor, chunk: int, out: Tensor) -> None:
    """See `shadowkv.kernels.slots.fill_keys`."""
    batch, heads, slots = held.shape
    head_dim, rank = out.shape[-1], factors.vectors.shape[1]
    check_head_dim(head_dim)
    scale = factors.coefficients if factors.scale is None else factors.scale
    read = factors.coefficients, scale, factors.vectors, rotary.cos, rotary.sin
    sizes = batch * heads, heads, slots, chunk, rank, head_dim
    strides = (
        *rows_of(factors.coefficients, 2), *rows_of(scale, 2), *rows_of(factors.vectors, 2),
        *rows_of(held, 1), *rows_of(out, 2),
    )  # fmt: skip
    compiled_for = {"CODED": factors.scale is not None, "RANK": _BLOCK_RANK, "INTERPRETED": interpreted()}

    def grid(sizes: dict[str, Any]) -> tuple[int]:
        tiles = batch * heads * triton.cdiv(slots * chunk, sizes["TOKENS"])
        return (min(_PROGRAMS_PER_PROCESSOR * processors(out.device), tiles),)

    if rotary.pairing is None:
        rebuild_chunks[grid](
            *read, rotary.pair, rotary.partner, rotary.sign, held, fill, out, *sizes, rotary.cos.shape[1], *strides,
            **compiled_for, TOKENS=tokens_at_once(head_dim) // 2, HEAD_DIM=padded(head_dim), num_warps=8,
        )  # fmt: skip
        return
    pairs, neighbours = rotary.pairing
    rest = head_dim - 2 * pairs
    rebuild_pairs[grid](
        *read, rotary.sign, held, fill, out, *sizes, *strides, **compiled_for, TOKENS=tokens_at_once(head_dim),
        NEIGHBOURS=neighbours, PAIRS=pairs, REST=rest, PAIR_BLOCK=padded(pairs), REST_BLOCK=padded(rest),
        num_warps=4 if head_dim <= 128 else 8,
    )  # fmt: skip
