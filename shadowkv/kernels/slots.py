"""Plain-torch reference of a decode step over resident slots; `shadowkv.kernels` has Triton twins of the same names.

A layer of a batch has, per KV head, S slots of one chunk each. The chunks that a step chooses and that are in a slot
already stay where they are; the others are filled into the slots that are free. Keys and values of a layer lie in one
buffer each, [B,H,R,D], in three regions (`Regions`): the slots, the outliers, and a ring of the newest tokens. Which
positions count is told by `spans` on the device, so that a step has the same shapes whatever the lengths are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shadowkv.anatomy.rotary_table import RotaryTable
from shadowkv.common.ranges import ranged
from shadowkv.tensors import ops
from shadowkv.tensors.ops import chunk_scores as chunk_scores
from shadowkv.tensors.ops import top_mask
from shadowkv.tensors.stored import CODINGS, Stored


class Regions(NamedTuple):
    """Tokens of the three regions of a buffer."""

    slots: int
    outliers: int
    ring: int

    @property
    def tokens(self) -> int:
        return sum(self)


class Factors(NamedTuple):
    """Low-rank keys of one layer: pre-RoPE key of token t and head h ~ (scale_t *) coefficients_t @ vectors_h.

    coefficients [B,n,r] in the keys' dtype, or int8 with scale [B,n,1] fp16; vectors [B,r,W].
    """

    coefficients: Tensor
    scale: Tensor | None
    vectors: Tensor


@ranged("selection")
def choose_chunks(scores: Tensor, numbers: Tensor, slots: int) -> Tensor:
    """Numbers of the chunks with the largest scores, ascending, then -1 where there are fewer than slots.

    scores [B,H,C] fp32, -inf where there is no chunk; numbers [B,H,C] int32, ascending -> [B,H,slots] int32.
    Of equal scores the chunk with the lower number is chosen.
    """
    chosen = top_mask(scores, slots) & (scores > -torch.inf)
    # Those chosen come first, in order, then all others.
    order = (~chosen).int().argsort(dim=-1, stable=True)[..., :slots]
    found = torch.where(chosen.gather(-1, order), numbers.gather(-1, order), -1)
    return torch.nn.functional.pad(found, (0, slots - found.shape[-1]), value=-1)


@ranged("selection")
def plan_fill(chosen: Tensor, held: Tensor) -> Tensor:
    """Give every chosen chunk a slot: `held` is changed in place, and what returned are the slots to be filled.

    chosen [B,H,S] int32, padded by -1 at the end; held [B,H,S] int32, the chunk in each slot, -1 for none ->
    [B,H,S] int32, ascending, padded by -1. With k chunks chosen the first k slots are in use; k never falls.
    """
    same = (chosen[..., :, None] == held[..., None, :]) & (chosen >= 0)[..., :, None]
    slots = torch.arange(held.shape[-1], device=held.device)
    count = (chosen >= 0).sum(dim=-1, keepdim=True)
    missed = (chosen >= 0) & ~same.any(dim=-1)
    free = (slots < count) & ~same.any(dim=-2)
    free &= free.cumsum(dim=-1) <= missed.sum(dim=-1, keepdim=True)  # more only where a chunk was chosen twice
    fill = _compact(slots.int().expand_as(held), free)
    entering = _compact(chosen, missed)
    filled = fill >= 0
    target = torch.where(filled, fill, held.shape[-1]).long()  # one slot too many takes what is not to be written
    padded = torch.cat((held, held[..., :1]), dim=-1)
    held.copy_(padded.scatter_(-1, target, entering)[..., :-1])
    return fill


@ranged("fetch")
def fill_values(stored: Stored, held: Tensor, fill: Tensor, chunk: int, out: Tensor) -> None:
    """Write the values of the chunks that `plan_fill` placed into their slots of out [B,H,R,D]."""
    index, target, filled = _tokens_to_fill(held, fill, chunk)
    _write(out, stored.gather(index).to(out.dtype), target, filled)


@ranged("rebuild")
def fill_keys(factors: Factors, rotary: RotaryTable, held: Tensor, fill: Tensor, chunk: int, out: Tensor) -> None:
    """Rebuild the keys of the chunks that `plan_fill` placed, with RoPE, into their slots of out [B,H,R,D]."""
    index, target, filled = _tokens_to_fill(held, fill, chunk)
    batch, heads, _ = index.shape
    rows = torch.arange(batch, device=index.device)[:, None, None]
    coefficients = factors.coefficients[rows, index].float()
    if factors.scale is not None:
        coefficients = coefficients * factors.scale[rows, index].float()
    by_head = factors.vectors.unflatten(2, (heads, -1)).transpose(1, 2).float()
    _write(out, rotary.rotate(coefficients @ by_head, index).to(out.dtype), target, filled)


@ranged("attention")
def attend_resident(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, regions: Regions, scaling: float) -> Tensor:
    """Exact softmax attention of one query per head over the positions in use.

    q [B,Hq,1,D]; k and v [B,H,R,D]; spans [B,4] int32: tokens in the slots, tokens of outliers, where the ring starts
    and how many tokens it holds. Returns [B,Hq,1,D].
    """
    batch, _, _, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, head_dim)
    scores = grouped.float() @ k.float().mT * scaling
    scores = scores.masked_fill(~positions_in_use(spans, regions)[:, None, None], float("-inf"))
    # What is not in use was never written: it may be NaN, and 0 * NaN is not 0.
    values = torch.where(positions_in_use(spans, regions)[:, None, :, None], v, 0)
    return (scores.softmax(dim=-1).to(v.dtype) @ values).view(q.shape)


@ranged("attention")
def attend_codes(q: Tensor, k: Stored, v: Stored, lengths: Tensor, scaling: float) -> Tensor:
    """Exact softmax attention of one query per head to what the codes of a row's tokens stand for.

    q [B,Hq,1,D]; k and v in int8 or fp8, of [B,H,R,D]; lengths [B] int32, tokens of each row. Returns [B,Hq,1,D].
    """
    batch, q_heads, _, head_dim = q.shape
    keys, values = (CODINGS[x.coding].decode(*x.parts) for x in (k, v))
    heads, tokens = keys.shape[1:3]
    there = (torch.arange(tokens, device=q.device) < lengths[:, None])[:, None, None]
    scores = q.reshape(batch, heads, q_heads // heads, head_dim).float() @ keys.mT * scaling
    weights = scores.masked_fill(~there, float("-inf")).softmax(dim=-1)
    # What is not there was never written: it may be NaN, and 0 * NaN is not 0.
    return (weights @ torch.where(there.mT, values, 0)).to(q.dtype).view(q.shape)


@ranged("selection")
def page_bounds(q: Tensor, low: Tensor, high: Tensor, lengths: Tensor, page: int) -> Tensor:
    """`ops.page_bounds` of the full pages before the newest one, +inf for that one and -inf for those after it.

    q [B,Hq,1,D], low and high [B,H,P,D]; lengths [B] int32, tokens of each row -> [B,H,G,P] fp32.
    """
    newest = ((lengths - 1) // page)[:, None, None, None]
    number = torch.arange(low.shape[2], device=low.device)
    unbounded = torch.where(number == newest, torch.inf, -torch.inf)
    return torch.where(number < newest, ops.page_bounds(q, low, high), unbounded)


@ranged("attention")
def attend_pages(q: Tensor, k: Tensor, v: Tensor, pages: Tensor, lengths: Tensor, page: int, scaling: float) -> Tensor:
    """Exact softmax attention of one query per head to the tokens of its pages.

    q [B,Hq,1,D]; k and v [B,H,R,D]; pages [B,L,S] int32, numbers of pages of `page` tokens, -1 for none, in a list per
    KV head (L = H) or per query head (L = Hq); lengths [B] int32, tokens of each row. Returns [B,Hq,1,D].
    """
    batch, lists, _ = pages.shape
    tokens = ops.token_indices(pages.clamp(min=0), page)
    used = (pages >= 0).repeat_interleave(page, dim=-1) & (tokens < lengths[:, None, None])
    # The first token takes the place of what is not in use, which may be NaN.
    index = torch.where(used, tokens, 0).view(batch, k.shape[1], -1, tokens.shape[-1])
    keys, values = (ops.gather_lists(x, index) for x in (k, v))
    grouped = q.reshape(batch, lists, -1, q.shape[-1])
    scores = (grouped.float() @ keys.float().mT * scaling).masked_fill(~used[:, :, None], float("-inf"))
    return (scores.softmax(dim=-1).to(v.dtype) @ values).view(q.shape)


def positions_in_use(spans: Tensor, regions: Regions) -> Tensor:
    """Which positions of a buffer count, [B,R] bool. See `attend_resident`."""
    position = torch.arange(regions.tokens, device=spans.device)
    slots, outliers, start, length = spans[..., None].unbind(dim=1)
    after_slots, in_ring = position - regions.slots, position - regions.slots - regions.outliers
    of_ring = (in_ring >= 0) & ((in_ring - start) % max(regions.ring, 1) < length)
    return (position < slots) | ((after_slots >= 0) & (after_slots < outliers) & (in_ring < 0)) | of_ring


def _compact(values: Tensor, kept: Tensor) -> Tensor:
    """Those kept first, in order, then -1. [...,n] -> [...,n]."""
    order = (~kept).int().argsort(dim=-1, stable=True)
    return torch.where(kept.gather(-1, order), values.gather(-1, order), -1)


def _tokens_to_fill(held: Tensor, fill: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Context tokens to read, buffer positions to write, and which of them are meant, [B,H,S*chunk] each."""
    filled = fill >= 0
    slot = fill.clamp(min=0).long()
    number = torch.where(filled, held.gather(-1, slot), 0).long()
    offsets = torch.arange(chunk, device=fill.device)
    index, target = ((x[..., None] * chunk + offsets).flatten(-2) for x in (number, slot))
    return index, target, filled.repeat_interleave(chunk, dim=-1)


def _write(out: Tensor, x: Tensor, target: Tensor, filled: Tensor) -> None:
    batch, heads, _ = filled.nonzero(as_tuple=True)
    out[batch, heads, target[filled]] = x[filled]
