"""Plain-torch reference of every operation on the decode path; fast twins have the same names and signatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Scores of a group's query heads [B,H,G,n] -> the scores that choose, [B,H,1,n] where the group shares its choice.
GROUP_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "per_q_head": lambda scores: scores,
    "group_max": lambda scores: scores.amax(dim=2, keepdim=True),
    "group_mean": lambda scores: scores.mean(dim=2, keepdim=True),
    "group_sum": lambda scores: scores.sum(dim=2, keepdim=True),
}


def attend(q: Tensor, segments: Sequence[tuple[Tensor, Tensor]], scaling: float) -> Tensor:
    """Exact softmax attention over the union of segments, the last T tokens of the last one being the queries'.

    q [B,Hq,T,D]; each segment k, v [B,H,n_i,D] with H dividing Hq; order does not matter, since keys carry
    their position. Query t sees all tokens but the last T-1-t. Returns [B,Hq,T,D].
    """
    batch, _q_heads, tokens, head_dim = q.shape
    heads = segments[0][0].shape[1]
    # Queries of one group read the same keys, so they are rows of one product and keys are never repeated.
    grouped = q.reshape(batch, heads, -1, head_dim)
    segments = [segment for segment in segments if segment[0].shape[2]]
    if len(segments) == 1 and tokens == 1:
        k, v = segments[0]
        return F.scaled_dot_product_attention(grouped, k, v, scale=scaling).view_as(q)
    weights = attention_weights(q, [k for k, _ in segments], scaling)
    parts = [w @ v for w, (_, v) in zip(weights, segments, strict=True)]
    return torch.stack(parts).sum(dim=0).view_as(q) if len(parts) > 1 else parts[0].view_as(q)


def attention_weights(q: Tensor, keys: Sequence[Tensor], scaling: float) -> tuple[Tensor, ...]:
    """What `attend` weighs values by: the share of each segment in one softmax, [B,H,G*T,n_i] for k [B,H,n_i,D]."""
    batch, _q_heads, tokens, head_dim = q.shape
    heads = keys[0].shape[1]
    grouped = q.reshape(batch, heads, -1, head_dim)
    scores = torch.cat([grouped @ k.mT for k in keys], dim=-1).float() * scaling
    if tokens > 1:
        by_query = scores.view(batch, heads, -1, tokens, scores.shape[-1])
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        by_query[..., -tokens:].masked_fill_(future, float("-inf"))
    weights: tuple[Tensor, ...] = scores.softmax(dim=-1).to(q.dtype).split([k.shape[2] for k in keys], dim=-1)
    return weights


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores of the last axis, ascending; ties go to the lower index.

    scores [..., n] fp32 -> [..., min(count, n)] int64.
    """
    if count >= scores.shape[-1]:
        return torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def token_indices(blocks: Tensor, block_tokens: int) -> Tensor:
    """Tokens of contiguous blocks. blocks [..., s] block numbers -> [..., s * block_tokens]."""
    offsets = torch.arange(block_tokens, device=blocks.device)
    return (blocks[..., None] * block_tokens + offsets).flatten(-2)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each head. x [B,H,n,D], index [B,H,s] -> [B,H,s,D] where the index is, wherever x is."""
    rows = x.gather(2, index.to(x.device)[..., None].expand(*index.shape, x.shape[-1]))
    return rows.to(index.device, non_blocking=True)


def chunk_scores(q: Tensor, landmarks: Tensor, scaling: float) -> Tensor:
    """How much each chunk matters to each KV head: max over the group of softmax(scaling * q landmark^T).

    q [B,Hq,1,D], landmarks [B,H,C,D] -> [B,H,C] fp32. ShadowKV, algorithm 2 (group reduction as its authors').
    """
    batch, _, _, head_dim = q.shape
    grouped = q.reshape(batch, landmarks.shape[1], -1, head_dim)
    return ((grouped @ landmarks.mT).float() * scaling).softmax(dim=-1).amax(dim=2)


def page_bounds(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Upper bound of q k over each page, for each query head. Quest, section 3.3.

    q [B,Hq,1,D], low and high [B,H,P,D] (element-wise extremes of a page's keys) -> [B,H,G,P] fp32.
    Splitting q by sign turns sum_d max(q_d low_d, q_d high_d) into two matrix products.
    """
    batch, _, _, head_dim = q.shape
    grouped = q.reshape(batch, low.shape[1], -1, head_dim).float()
    return grouped.clamp(min=0) @ high.float().mT + grouped.clamp(max=0) @ low.float().mT


def rebuild(coefficients: Tensor, vectors: Tensor, mean: Tensor, index: Tensor) -> Tensor:
    """Pre-RoPE keys of the chosen tokens from their low-rank factors.

    coefficients [B,n,r] (shared by the heads), vectors [B,r,W], mean [B,1,W], index [B,H,s] -> [B,H,s,D].
    """
    batch, heads, count = index.shape
    rank = coefficients.shape[-1]
    rows = coefficients.gather(1, index.reshape(batch, -1, 1).expand(-1, -1, rank)).view(batch, heads, count, rank)
    by_head = vectors.view(batch, rank, heads, -1).transpose(1, 2)
    return rows @ by_head + mean.view(batch, 1, heads, -1).transpose(1, 2)
