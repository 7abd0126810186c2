"""Keys of chunks that were missed: gather rows of coefficients, multiply, rotate, put into their slots.

The partner that RoPE mixes a channel with is a product of the same coefficients with another column, so a second
product takes the place of exchanging channels between threads, for any way of pairing them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shadowkv.anatomy.rotary_table import RotaryTable
from shadowkv.common.ranges import ranged
from shadowkv.kernels.backend import interpreted
from shadowkv.kernels.launch import check_head_dim, padded, product, rows_of
from shadowkv.kernels.slots import Factors

_BLOCK_RANK = 32


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
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    width = heads * head_dim
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    entry = m // chunk
    slot = tl.load(fill + row * slots + entry, mask=entry < slots, other=-1)
    if tl.max(slot, axis=0) >= 0:
        filled = slot >= 0
        number = tl.load(held + batch * held_b + head * held_h + slot, mask=filled, other=0)
        token = number * chunk + m % chunk
        d, k = tl.arange(0, HEAD_DIM), tl.arange(0, RANK)
        known = d < head_dim
        other = tl.load(partner + d, mask=known, other=0)
        own = tl.zeros((TOKENS, HEAD_DIM), tl.float32)
        mixed = tl.zeros((TOKENS, HEAD_DIM), tl.float32)
        for first in range(0, rank, RANK):
            of_rank = first + k < rank
            rows = tl.load(
                coefficients + batch * coefficients_b + token[:, None] * rank + first + k[None, :],
                mask=filled[:, None] & of_rank[None, :],
                other=0,
            )
            rows = rows.to(tl.float32).to(vectors.dtype.element_ty)  # by way of fp32 for the interpreter
            at = vectors + batch * vectors_b + (first + k[:, None]) * width + head * head_dim
            asked = of_rank[:, None] & known[None, :]
            own = product(rows, tl.load(at + d[None, :], mask=asked, other=0.0), own, INTERPRETED)
            turned = tl.load(at + other[None, :], mask=asked, other=0.0)
            mixed = product(rows, turned, mixed, INTERPRETED)
        if CODED:
            scale = tl.load(scales + batch * scales_b + token, mask=filled, other=0.0).to(tl.float32)
            own, mixed = own * scale[:, None], mixed * scale[:, None]
        turn = tl.load(sign + d, mask=known, other=0.0)
        angle = token[:, None] * pairs + tl.load(pair + d, mask=known, other=0)[None, :]
        rotated = filled[:, None] & (turn != 0.0)[None, :]
        c = tl.load(cos + angle, mask=rotated, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=rotated, other=0.0).to(tl.float32)
        key = own * c + mixed * s * turn[None, :]
        target = out + batch * out_b + head * out_h + (slot * chunk + m % chunk)[:, None] * head_dim + d[None, :]
        tl.store(target, key.to(out.dtype.element_ty), mask=filled[:, None] & known[None, :])


def tokens_at_once(head_dim: int) -> int:
    """Tokens of one program: two products of this size are held in registers."""
    return 32 if head_dim <= 128 else 16


@ranged("rebuild")
def fill_keys(factors: Factors, rotary: RotaryTable, held: Tensor, fill: Tensor, chunk: int, out: Tensor) -> None:
    """See `shadowkv.kernels.slots.fill_keys`."""
    batch, heads, slots = held.shape
    head_dim, rank = out.shape[-1], factors.vectors.shape[1]
    check_head_dim(head_dim)
    scale = factors.coefficients if factors.scale is None else factors.scale
    tokens = tokens_at_once(head_dim)
    rebuild_chunks[(batch * heads, triton.cdiv(slots * chunk, tokens))](
        factors.coefficients, scale, factors.vectors, *rotary, held, fill, out,
        heads, slots, chunk, rank, head_dim, rotary.cos.shape[1],
        *rows_of(factors.coefficients, 2), *rows_of(scale, 2), *rows_of(factors.vectors, 2),
        *rows_of(held, 1), *rows_of(out, 2),
        CODED=factors.scale is not None, TOKENS=tokens, RANK=_BLOCK_RANK, HEAD_DIM=padded(head_dim),
        INTERPRETED=interpreted(), num_warps=8,
    )  # fmt: skip
