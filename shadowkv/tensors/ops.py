"""Plain-torch reference of every operation on the decode path; fast twins have the same names and signatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowkv.common.ranges import ranged

# Scores [B,H,G,n] of a group's query heads -> the scores that choose: [B,H,1,n] where the group shares one choice.
GROUP_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "per_q_head": lambda scores: scores,
    "group_max": lambda scores: scores.amax(dim=2, keepdim=True),
    "group_mean": lambda scores: scores.mean(dim=2, keepdim=True),
    "group_sum": lambda scores: scores.sum(dim=2, keepdim=True),
}
# For methods that keep one set of tokens per KV head.
SHARED_REDUCTIONS = {name: reduce for name, reduce in GROUP_REDUCTIONS.items() if name != "per_q_head"}

# fp32 scores of one row of a batch that `received_attention` holds at a time: what a CPU has cache for (1 MiB; larger
# blocks are several times slower), and 256 MiB to keep a GPU busy.
_SCORES_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}


@ranged("attention")
def attend(q: Tensor, segments: Sequence[tuple[Tensor, Tensor]], scaling: float) -> Tensor:
    """Exact softmax attention over the union of segments, the last T tokens of the last one being the queries'.

    q [B,Hq,T,D]; each segment k [B,H,n_i,D], v [B,H,n_i,E] with H dividing Hq; order does not matter, since keys
    carry their position. Query t sees all tokens but the last T-1-t. Returns [B,Hq,T,E].
    """
    batch, q_heads, tokens, head_dim = q.shape
    heads = segments[0][0].shape[1]
    # Queries of one group read the same keys, so they are rows of one product and keys are never repeated.
    grouped = q.reshape(batch, heads, -1, head_dim)
    segments = [segment for segment in segments if segment[0].shape[2]]
    if len(segments) == 1 and tokens == 1:
        k, v = segments[0]
        return F.scaled_dot_product_attention(grouped, k, v, scale=scaling).view(batch, q_heads, tokens, -1)
    weights = segment_weights(q, [k for k, _ in segments], scaling)
    parts = [w @ v for w, (_, v) in zip(weights, segments, strict=True)]
    out = torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]
    return out.view(batch, q_heads, tokens, -1)


@ranged("attention")
def segment_weights(q: Tensor, keys: Sequence[Tensor], scaling: float) -> tuple[Tensor, ...]:
    """What `attend` weighs values by: the share of each segment in one softmax, [B,H,G*T,n_i] for k [B,H,n_i,D]."""
    batch, _q_heads, tokens, head_dim = q.shape
    heads = keys[0].shape[1]
    grouped = q.reshape(batch, heads, -1, head_dim)
    scores = torch.cat([grouped.float() @ k.float().mT for k in keys], dim=-1) * scaling
    if tokens > 1:
        by_query = scores.view(batch, heads, -1, tokens, scores.shape[-1])
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        by_query[..., -tokens:].masked_fill_(future, float("-inf"))
    weights: tuple[Tensor, ...] = scores.softmax(dim=-1).to(q.dtype).split([k.shape[2] for k in keys], dim=-1)
    return weights


@ranged("selection")
def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores of the last axis, ascending; ties go to the lower index.

    scores [..., n] fp32 -> [..., min(count, n)] int64.
    """
    if count >= scores.shape[-1]:
        return torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    # The i-th index is where the running count of chosen ones first reaches i: no sort, no wait for a GPU.
    chosen = top_mask(scores, count).cumsum(dim=-1)
    return torch.searchsorted(chosen, torch.arange(1, count + 1, device=scores.device).repeat(*scores.shape[:-1], 1))


@ranged("selection")
def top_mask(scores: Tensor, count: int) -> Tensor:
    """True at the indices that `top_indices` returns. scores [..., n] -> bool [..., n]."""
    if not 0 < count < scores.shape[-1]:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    least = scores.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, ties = scores > least, scores == least
    return above | (ties & (ties.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))


def weakest(scores: Tensor) -> Tensor:
    """Index of the smallest score, [..., n] -> [..., 1]; of ties the higher index, so that the lower ones stay."""
    return scores.shape[-1] - 1 - scores.flip(-1).argmin(dim=-1, keepdim=True)


@ranged("selection")
def token_indices(blocks: Tensor, block_tokens: int) -> Tensor:
    """Tokens of contiguous blocks. blocks [..., s] block numbers -> [..., s * block_tokens]."""
    offsets = torch.arange(block_tokens, device=blocks.device)
    return (blocks[..., None] * block_tokens + offsets).flatten(-2)


@ranged("fetch")
def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each head. x [B,H,n,D], index [B,H,s] -> [B,H,s,D] where the index is, wherever x is."""
    # Indexing copies rows, which `gather` does element by element: several times slower on a CPU.
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    heads = torch.arange(x.shape[1], device=x.device)[:, None]
    return x[batch, heads, index.to(x.device)].to(index.device, non_blocking=True)


@ranged("fetch")
def gather_lists(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of L lists per head. x [B,H,n,D], index [B,H,L,s] -> [B,H*L,s,D]."""
    batch, heads, lists, count = index.shape
    return gather_tokens(x, index.flatten(2)).view(batch, heads * lists, count, -1)


@ranged("attention")
def attention_scores(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """One query per head against all keys, before the softmax. q [B,Hq,1,D], k [B,H,n,D] -> [B,H,G,n] fp32."""
    batch, _, _, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, head_dim)
    return (grouped.float() @ k.float().mT) * scaling


@ranged("attention")
def attention_weights(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """Softmax of one query per head over all keys. q [B,Hq,1,D], k [B,H,n,D] -> [B,H,G,n] fp32."""
    return attention_scores(q, k, scaling).softmax(dim=-1)


@ranged("attention")
def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """What attention weights make of the values. weights [B,H,G,n], v [B,H,n,D] -> [B,Hq,1,D]."""
    return (weights.to(v.dtype) @ v).flatten(1, 2).unsqueeze(2)


def received_attention(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """Attention that each key gets from T queries, summed over the queries: column sums of the causal softmax.

    q [B,Hq,T,D], the queries of the last T keys; k [B,H,n,D] -> [B,H,G,n] fp32, which sums to T per query head.
    Works on blocks of queries, so that T x n weights never exist at once.
    """
    batch, q_heads, tokens, head_dim = q.shape
    heads, total = k.shape[1], k.shape[2]
    keys, first = k.float(), total - tokens
    received = torch.zeros(batch, heads, q_heads // heads, total, device=k.device)
    block = max(_SCORES_AT_ONCE.get(k.device.type, 2**26) // (q_heads * total), 1)
    for begin in range(first, total, block):
        end = min(begin + block, total)
        rows = q[:, :, begin - first : end - first].float().reshape(batch, heads, -1, head_dim)
        scores = ((rows @ keys[:, :, :end].mT) * scaling).view(batch, heads, -1, end - begin, end)
        future = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).triu(1)
        scores[..., begin:].masked_fill_(future, float("-inf"))
        received[..., :end] += scores.softmax(dim=-1).sum(dim=-2)
    return received


@ranged("selection")
def chunk_scores(q: Tensor, landmarks: Tensor, scaling: float, counts: Tensor | None = None) -> Tensor:
    """How much each chunk matters to each KV head: max over the group of softmax(scaling * q landmark^T).

    q [B,Hq,1,D], landmarks [B,H,C,D] -> [B,H,C] fp32. ShadowKV, algorithm 2 (group reduction as its authors').
    counts [B] int32: how many landmarks a row has, where it is not all C of them; the others score -inf.
    """
    batch, _, _, head_dim = q.shape
    grouped = q.reshape(batch, landmarks.shape[1], -1, head_dim)
    logits = grouped.float() @ landmarks.float().mT * scaling
    if counts is None:
        return logits.softmax(dim=-1).amax(dim=2)
    there = torch.arange(landmarks.shape[2], device=q.device) < counts[:, None, None]
    masked = torch.where(there[:, :, None], logits, -torch.inf)  # what is not there may be NaN
    return torch.where(there, masked.softmax(dim=-1).amax(dim=2), -torch.inf)


@ranged("selection")
def page_bounds(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Upper bound of q k over each page, for each query head. Quest, section 3.3.

    q [B,Hq,1,D], low and high [B,H,P,D] (element-wise extremes of a page's keys) -> [B,H,G,P] fp32.
    Splitting q by sign turns sum_d max(q_d low_d, q_d high_d) into two matrix products.
    """
    batch, _, _, head_dim = q.shape
    grouped = q.reshape(batch, low.shape[1], -1, head_dim).float()
    return grouped.clamp(min=0) @ high.float().mT + grouped.clamp(max=0) @ low.float().mT


@ranged("rebuild")
def rebuild(coefficients: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    """Pre-RoPE keys of the chosen tokens from their low-rank factors.

    coefficients [B,n,r] (shared by the heads), vectors [B,r,W], index [B,H,s] -> [B,H,s,D].
    """
    return expand(gather_shared(coefficients, index), vectors)


def expand(rows: Tensor, vectors: Tensor) -> Tensor:
    """Keys of each head from rows of coefficients. rows [B,H,s,r], vectors [B,r,W] -> [B,H,s,D]."""
    batch, heads, _, rank = rows.shape
    by_head = vectors.reshape(batch, rank, heads, -1).transpose(1, 2)
    return rows @ by_head


def gather_shared(x: Tensor, index: Tensor) -> Tensor:
    """Rows that all heads share, as each head asks. x [B,n,r], index [B,H,s] -> [B,H,s,r]."""
    batch, heads, count = index.shape
    rows = x.gather(1, index.reshape(batch, -1, 1).expand(-1, -1, x.shape[-1]))
    return rows.view(batch, heads, count, -1)
