"""Landmark scores: max over a group of softmax(q landmark^T). ShadowKV, algorithm 2.

The softmax runs over all chunks, so no block knows its scores before all have been seen. The first kernel reads the
landmarks once and leaves logits and each block's maximum and sum; the second, per chunk, 4 bytes per query head
instead of the landmark's 2 D, turns them into scores. Reading landmarks twice would cost more for every G < D / 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.kernels.backend import interpreted
from shadowkv.kernels.launch import check_head_dim, load_queries, padded, product, rows_of, wide_rows

_BLOCKS_AT_ONCE = 64


@triton.jit
def chunk_logits(
    q,
    landmarks,
    counts,
    logits,
    block_max,
    block_sum,
    scaling,
    heads,
    group,
    chunks,
    width,
    head_dim,
    stride_b,
    stride_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # of batch x heads
    block = tl.program_id(1)
    batch, head = row // heads, row % heads
    g, d = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM)
    c = block * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + batch)
    asked = load_queries(q, row, group, head_dim, g, d)
    there = c < tl.minimum(count, chunks)
    at = landmarks + batch * stride_b + head * stride_h + c[:, None] * head_dim + d[None, :]
    means = tl.load(at, mask=there[:, None] & (d[None, :] < head_dim), other=0.0)
    z = product(asked, tl.trans(means), tl.zeros((GROUP, BLOCK), tl.float32), INTERPRETED) * scaling
    z = tl.where(there[None, :], z, float("-inf"))
    out = logits + (row * group + g[:, None]) * width + c[None, :]
    tl.store(out, z, mask=(g[:, None] < group) & (c[None, :] < width))
    largest = tl.max(z, axis=1)
    total = tl.sum(tl.where(there[None, :], tl.exp(z - largest[:, None]), 0.0), axis=1)
    partial = (row * tl.num_programs(1) + block) * group + g
    tl.store(block_max + partial, largest, mask=g < group)
    tl.store(block_sum + partial, total, mask=g < group)


@triton.jit
def group_scores(
    logits,
    block_max,
    block_sum,
    counts,
    scores,
    heads,
    group,
    chunks,
    width,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    g = tl.arange(0, GROUP)
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    for first in range(0, blocks, BLOCKS):
        n = first + tl.arange(0, BLOCKS)
        known = (n[:, None] < blocks) & (g[None, :] < group)
        at = (row * blocks + n[:, None]) * group + g[None, :]
        peaks = tl.load(block_max + at, mask=known, other=float("-inf"))
        sums = tl.load(block_sum + at, mask=known, other=0.0)
        higher = tl.maximum(largest, tl.max(peaks, axis=0))
        # A block without chunks has -inf and sum 0; so has everything in a row without any.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - safe) + tl.sum(sums * tl.exp(peaks - safe[None, :]), axis=0)
        largest = higher
    c = block * BLOCK + tl.arange(0, BLOCK)
    there = c < tl.minimum(tl.load(counts + row // heads), chunks)
    at = logits + (row * group + g[:, None]) * width + c[None, :]
    # Also of chunks that are not there, for which there are logits of -inf: what is asked for then has no gaps.
    z = tl.load(at, mask=(g[:, None] < group) & (c[None, :] < width), other=float("-inf"))
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.exp(z - safe[:, None]) / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(scores + row * width + c, tl.where(there, tl.max(share, axis=0), float("-inf")), mask=c < width)


def landmarks_at_once(head_dim: int) -> int:
    """Landmarks of one program, held in registers."""
    return 128 if head_dim <= 128 else 64


@ranged("selection")
def chunk_scores(q: Tensor, landmarks: Tensor, scaling: float, counts: Tensor) -> Tensor:
    """See `shadowkv.tensors.ops.chunk_scores`. landmarks [B,H,C,D] with its last two axes contiguous.

    Rows of what is returned may lie further apart than they are long, as `choose_chunks` reads them.
    """
    batch, heads, chunks, head_dim = landmarks.shape
    check_head_dim(head_dim)
    group, rows, blocks = q.shape[1] // heads, batch * heads, triton.cdiv(chunks, landmarks_at_once(head_dim))
    stride_b, stride_h = rows_of(landmarks, 2)
    logits = wide_rows(rows, group, chunks, device=q.device)
    block_max, block_sum = torch.empty(2, rows, blocks, group, dtype=torch.float32, device=q.device)
    scores = wide_rows(batch, heads, chunks, device=q.device)
    width = scores.stride(1)
    grid = (rows, blocks)
    sizes = {"GROUP": padded(group), "BLOCK": landmarks_at_once(head_dim)}
    chunk_logits[grid](
        q.contiguous(), landmarks, counts, logits, block_max, block_sum, scaling, heads, group, chunks, width,
        head_dim, stride_b, stride_h, HEAD_DIM=padded(head_dim), INTERPRETED=interpreted(), **sizes,
    )  # fmt: skip
    group_scores[grid](
        logits, block_max, block_sum, counts, scores, heads, group, chunks, width, BLOCKS=_BLOCKS_AT_ONCE, **sizes
    )
    return scores
