"""Values of chunks that were missed: read where they are, also in pinned host memory, decoded, put into their slots.

A few programs of one warp each go over all chunks: enough reads under way to fill the bus, and nearly the whole GPU
left to what runs beside them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.kernels.launch import check_head_dim, padded, rows_of
from shadowkv.tensors.stored import Stored, int4_group

_PROGRAMS = 256
_CODES = {"native": 0, "bf16": 0, "int8": 1, "fp8": 2, "int4": 3}


@triton.jit
def copy_chunks(
    codes,
    scales,
    zeros,
    held,
    fill,
    out,
    rows,
    heads,
    slots,
    chunk,
    head_dim,
    groups,
    codes_b,
    codes_h,
    scales_b,
    scales_h,
    held_b,
    held_h,
    out_b,
    out_h,
    CODE: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
):
    c, d = tl.arange(0, CHUNK), tl.arange(0, HEAD_DIM)
    byte, shared = tl.arange(0, HEAD_DIM // 2), tl.arange(0, HEAD_DIM // GROUP)
    there = c < chunk
    known = there[:, None] & (d[None, :] < head_dim)
    # Slots to fill come first in every row: all rows' first ones are work for all programs.
    for item in range(tl.program_id(0), rows * slots, tl.num_programs(0)):
        row, entry = (item % rows).to(tl.int64), item // rows
        batch, head = row // heads, row % heads
        slot = tl.load(fill + row * slots + entry)
        if slot >= 0:
            number = tl.load(held + batch * held_b + head * held_h + slot)
            token = number * chunk + c
            scaled = batch * scales_b + head * scales_h
            source = codes + batch * codes_b + head * codes_h
            if CODE == 0:
                x = tl.load(source + token[:, None] * head_dim + d[None, :], mask=known, other=0.0).to(tl.float32)
            elif CODE == 3:
                at = token[:, None] * (head_dim // 2) + byte[None, :]
                packed = tl.load(source + at, mask=there[:, None] & (byte[None, :] < head_dim // 2), other=0)
                # As many bytes share a scale as half a group: an axis of their own.
                packed = tl.reshape(packed, (CHUNK, HEAD_DIM // GROUP, GROUP // 2))
                of_group = scaled + token[:, None] * groups + shared[None, :]
                asked = there[:, None] & (shared[None, :] < groups)
                scale = tl.load(scales + of_group, mask=asked, other=0.0).to(tl.float32)[:, :, None]
                zero = tl.load(zeros + of_group, mask=asked, other=0.0).to(tl.float32)[:, :, None]
                even = (packed & 15).to(tl.float32) * scale + zero
                odd = (packed >> 4).to(tl.float32) * scale + zero
                x = tl.reshape(tl.join(even, odd), (CHUNK, HEAD_DIM))
            else:
                code = tl.load(source + token[:, None] * head_dim + d[None, :], mask=known, other=0)
                scale = tl.load(scales + scaled + token, mask=there, other=0.0).to(tl.float32)[:, None]
                if CODE == 1:
                    x = code.to(tl.float32) * scale
                else:
                    # e4m3 as fp16: the same fields, an exponent that is 8 less. Not every GPU converts it itself.
                    wide = code.to(tl.int16)
                    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
                    x = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0 * scale
            target = out + batch * out_b + head * out_h + (slot * chunk + c[:, None]) * head_dim + d[None, :]
            tl.store(target, x.to(out.dtype.element_ty), mask=known)


@ranged("fetch")
def fill_values(stored: Stored, held: Tensor, fill: Tensor, chunk: int, out: Tensor) -> None:
    """See `shadowkv.kernels.slots.fill_values`. What is stored is pinned, or on the device."""
    batch, heads, slots = held.shape
    head_dim = out.shape[-1]
    check_head_dim(head_dim)
    codes, *scaling = stored.parts
    scales = scaling[0] if scaling else codes
    zeros = scaling[1] if len(scaling) > 1 else scales
    group = int4_group(head_dim) if stored.coding == "int4" else 1
    copy_chunks[(min(_PROGRAMS, batch * heads * slots),)](
        codes, scales, zeros, held, fill, out, batch * heads, heads, slots, chunk, head_dim, head_dim // group,
        *rows_of(codes, 2), *rows_of(scales, 2), *rows_of(held, 1), *rows_of(out, 2),
        CODE=_CODES[stored.coding], CHUNK=padded(chunk, 1), HEAD_DIM=padded(head_dim),
        GROUP=group, num_warps=1,
    )  # fmt: skip
