"""Attention of one token per row to keys and values of 8 bits, in parallel over stretches of them.

Codes are whole numbers up to 127, or e4m3: exact in the type of any query, so products are those of the codes
themselves, and scales stay outside. A key's multiplies its token's score. A value's is added to the score as a
logarithm: a weight times a small scale would be lost in fp16, where one next to the largest is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.kernels.attention import Stretches, block_of, keep_stretch, nothing_absorbed
from shadowkv.kernels.backend import interpreted
from shadowkv.kernels.launch import check_head_dim, load_queries, padded, product, rows_of
from shadowkv.tensors.stored import Stored

_CODES = {"int8": 1, "fp8": 2}  # as in `shadowkv.kernels.fetch`


@triton.jit
def numbers(codes, like, CODE: tl.constexpr):
    """What codes stand for, in the type of `like`; of fp8 a 256th of it."""
    if CODE == 1:
        wide = codes.to(tl.float32)  # by way of fp32 for the interpreter
    else:
        # e4m3 as fp16: the same fields, an exponent that is 8 less. Triton's own type takes a GPU of sm_89.
        bits = codes.to(tl.int16)
        wide = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32)
    return wide.to(like.dtype)


@triton.jit
def attend_code_stretch(
    q,
    k,
    k_scales,
    v,
    v_scales,
    lengths,
    part,
    part_max,
    part_sum,
    scaling,
    heads,
    group,
    head_dim,
    stretch,
    lengths_b,
    k_b,
    k_h,
    k_scales_b,
    k_scales_h,
    v_b,
    v_h,
    v_scales_b,
    v_scales_h,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, head = row // heads, row % heads
    unit = 256.0 if CODE == 2 else 1.0
    g, d, n = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK)
    known = d < head_dim
    asked = load_queries(q, row, group, head_dim, g, d)
    largest, total, held = nothing_absorbed(GROUP, HEAD_DIM)
    end = tl.minimum((split + 1) * stretch, tl.load(lengths + batch * lengths_b))
    for first in range(split * stretch, end, BLOCK):
        token = first + n
        used = token < end
        there = used[:, None] & known[None, :]
        at = token[:, None] * head_dim + d[None, :]
        keys = numbers(tl.load(k + batch * k_b + head * k_h + at, mask=there, other=0), asked, CODE)
        of_keys = tl.load(k_scales + batch * k_scales_b + head * k_scales_h + token, mask=used, other=0.0)
        z = product(asked, tl.trans(keys), tl.zeros((GROUP, BLOCK), tl.float32), INTERPRETED)
        z = z * (of_keys.to(tl.float32) * unit * scaling)[None, :]
        of_values = tl.load(v_scales + batch * v_scales_b + head * v_scales_h + token, mask=used, other=1.0)
        of_values = of_values.to(tl.float32) * unit
        z = tl.where(used[None, :], z + tl.log(of_values)[None, :], float("-inf"))
        higher = tl.maximum(largest, tl.max(z, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights, shrink = tl.exp(z - safe[:, None]), tl.exp(largest - safe)
        # Without the scales again, of which the sum of weights knows nothing.
        total = total * shrink + tl.sum(weights * (1.0 / of_values)[None, :], axis=1)
        values = numbers(tl.load(v + batch * v_b + head * v_h + at, mask=there, other=0), asked, CODE)
        held = product(weights.to(asked.dtype), values, held * shrink[:, None], INTERPRETED)
        largest = higher
    keep_stretch(part, part_max, part_sum, largest, total, held, row, split, group, head_dim, g, d)


@ranged("attention")
def attend_codes(q: Tensor, k: Stored, v: Stored, lengths: Tensor, scaling: float) -> Tensor:
    """See `shadowkv.kernels.slots.attend_codes`."""
    batch, q_heads, _, head_dim = q.shape
    check_head_dim(head_dim)
    (k_codes, k_scales), (v_codes, v_scales) = k.parts, v.parts
    heads, tokens = k_codes.shape[1:3]
    group, rows = q_heads // heads, batch * heads
    stretches = Stretches.of(tokens, rows, group, head_dim, q.device, element_bytes=1)
    attend_code_stretch[stretches.held.shape[:2]](
        q.contiguous(), k_codes, k_scales, v_codes, v_scales, lengths, *stretches[1:], scaling, heads, group, head_dim,
        stretches.tokens, lengths.stride(0), *rows_of(k_codes, 2), *rows_of(k_scales, 2), *rows_of(v_codes, 2),
        *rows_of(v_scales, 2), CODE=_CODES[k.coding], GROUP=padded(group), HEAD_DIM=padded(head_dim),
        BLOCK=block_of(head_dim), INTERPRETED=interpreted(),
    )  # fmt: skip
    return stretches.join(torch.empty_like(q, memory_format=torch.contiguous_format))
