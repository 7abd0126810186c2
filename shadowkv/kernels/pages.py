"""Pages of keys and values in place: a bound on what each can matter, and attention to lists of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.kernels.attention import Stretches, absorb, block_of, keep_stretch, nothing_absorbed
from shadowkv.kernels.backend import interpreted
from shadowkv.kernels.launch import check_head_dim, load_queries, padded, product, rows_of


@triton.jit
def bound_pages(
    q,
    low,
    high,
    lengths,
    bounds,
    heads,
    group,
    pages,
    page,
    head_dim,
    low_b,
    low_h,
    high_b,
    high_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # of batch x heads
    batch, head = row // heads, row % heads
    g, d = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    newest = (tl.load(lengths + batch) - 1) // page
    asked = load_queries(q, row, group, head_dim, g, d)
    wide = asked.to(tl.float32)  # the interpreter compares the bits of bf16 numbers
    older = p < newest
    known = older[:, None] & (d[None, :] < head_dim)
    at = p[:, None] * head_dim + d[None, :]
    largest = tl.load(high + batch * high_b + head * high_h + at, mask=known, other=0.0)
    rising = tl.maximum(wide, 0.0).to(asked.dtype)
    z = product(rising, tl.trans(largest), tl.zeros((GROUP, BLOCK), tl.float32), INTERPRETED)
    least = tl.load(low + batch * low_b + head * low_h + at, mask=known, other=0.0)
    z = product(tl.minimum(wide, 0.0).to(asked.dtype), tl.trans(least), z, INTERPRETED)
    z = tl.where(older[None, :], z, tl.where(p == newest, float("inf"), float("-inf"))[None, :])
    out = bounds + (row * group + g[:, None]) * pages + p[None, :]
    tl.store(out, z, mask=(g[:, None] < group) & (p[None, :] < pages))


@triton.jit
def attend_listed(
    q,
    k,
    v,
    pages,
    lengths,
    part,
    part_max,
    part_sum,
    scaling,
    lists,
    lists_of_head,
    group,
    head_dim,
    listed,
    page,
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
    row = tl.program_id(0).to(tl.int64)  # of batch x lists
    split = tl.program_id(1)
    batch, head = row // lists, (row % lists) // lists_of_head
    length = tl.load(lengths + batch)
    g, d, n = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK)
    known = d < head_dim
    asked = load_queries(q, row, group, head_dim, g, d)
    largest, total, held = nothing_absorbed(GROUP, HEAD_DIM)
    end = tl.minimum((split + 1) * stretch, listed * page)
    for first in range(split * stretch, end, BLOCK):
        position = first + n
        number = tl.load(pages + row * listed + position // page, mask=position < end, other=-1)
        token = number * page + position % page
        used = (number >= 0) & (token < length)
        at = token[:, None] * head_dim + d[None, :]
        largest, total, held = absorb(
            asked, k + batch * k_b + head * k_h, v + batch * v_b + head * v_h, at, used, known, scaling,
            largest, total, held, GROUP, BLOCK, INTERPRETED,
        )  # fmt: skip
    keep_stretch(part, part_max, part_sum, largest, total, held, row, split, group, head_dim, g, d)


def pages_at_once(head_dim: int) -> int:
    """Pages of one program, whose extremes are held in registers."""
    return 64 if head_dim <= 128 else 32


@ranged("selection")
def page_bounds(q: Tensor, low: Tensor, high: Tensor, lengths: Tensor, page: int) -> Tensor:
    """See `shadowkv.kernels.slots.page_bounds`."""
    batch, heads, pages, head_dim = low.shape
    check_head_dim(head_dim)
    group, block = q.shape[1] // heads, pages_at_once(head_dim)
    bounds = torch.empty(batch, heads, group, pages, dtype=torch.float32, device=q.device)
    bound_pages[(batch * heads, triton.cdiv(pages, block))](
        q.contiguous(), low, high, lengths, bounds, heads, group, pages, page, head_dim, *rows_of(low, 2),
        *rows_of(high, 2), GROUP=padded(group), HEAD_DIM=padded(head_dim), BLOCK=block, INTERPRETED=interpreted(),
    )  # fmt: skip
    return bounds


@ranged("attention")
def attend_pages(q: Tensor, k: Tensor, v: Tensor, pages: Tensor, lengths: Tensor, page: int, scaling: float) -> Tensor:
    """See `shadowkv.kernels.slots.attend_pages`."""
    batch, q_heads, _, head_dim = q.shape
    check_head_dim(head_dim)
    _, lists, listed = pages.shape
    group, rows = q_heads // lists, batch * lists
    stretches = Stretches.of(listed * page, rows, group, head_dim, q.device, k.element_size())
    attend_listed[stretches.held.shape[:2]](
        q.contiguous(), k, v, pages.contiguous(), lengths, *stretches[1:], scaling, lists, lists // k.shape[1], group,
        head_dim, listed, page, stretches.tokens, *rows_of(k, 2), *rows_of(v, 2), GROUP=padded(group),
        HEAD_DIM=padded(head_dim), BLOCK=block_of(head_dim), INTERPRETED=interpreted(),
    )  # fmt: skip
    return stretches.join(torch.empty_like(q, memory_format=torch.contiguous_format))
