"""A model's rotary embedding as plain tables, read off by rotating probes: no code per family.

Every rotary embedding turns pairs of channels by an angle that depends on the position: y_d = x_d cos + sign_d
x_partner(d) sin. Which channels pair up (halves for Llama, neighbours in half of the width for GLM) and what the
factors are (YaRN and longrope scale them) shows in what the model's own functions make of unit vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.errors import SkvError


class Pairing(NamedTuple):
    """Where the channels of `pairs` pairs lie, if it is one of the two usual ways, and those that are not turned after.

    Pair p is of channels p and p + pairs (Llama), or 2p and 2p + 1 (GLM). Kernels are compiled for it, so it is known
    on the host.
    """

    pairs: int
    neighbours: bool

    @classmethod
    def of(cls, pair: Tensor, partner: Tensor, sign: Tensor) -> Pairing | None:
        """The way of a table's channels; None for any other. Waits for the device."""
        channels, turned = torch.arange(len(sign)), (sign != 0).cpu()
        pairs = int(turned.sum()) // 2
        if not torch.equal(turned, channels < 2 * pairs):
            return None
        found = torch.stack((pair, partner)).cpu()[:, turned]
        halves = torch.stack((channels % max(pairs, 1), (channels + pairs) % max(2 * pairs, 1)))
        neighbours = torch.stack((channels // 2, channels ^ 1))
        if torch.equal(found, halves[:, turned].int()):
            return cls(pairs, neighbours=False)
        return cls(pairs, neighbours=True) if torch.equal(found, neighbours[:, turned].int()) else None


class RotaryTable(NamedTuple):
    """cos and sin [N,P] of P pairs at positions below N; per channel [D] its pair, its partner, and the sign of sin.

    A channel that is not rotated has sign 0. Where a norm with weights follows the rotation, the sign is times what it
    makes of the partner's channel in this one. `pairing` says what `pair` and `partner` say, where it has words for it.
    """

    cos: Tensor
    sin: Tensor
    pair: Tensor  # int32
    partner: Tensor  # int32
    sign: Tensor  # fp32
    pairing: Pairing | None

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoPE of x [B,H,s,D] fp32 at positions [B,H,s]."""
        pair, rotated = self.pair.long(), self.sign != 0
        cos = torch.where(rotated, self.cos[positions][..., pair].float(), 1)
        return x * cos + x[..., self.partner.long()] * (self.sin[positions][..., pair].float() * self.sign)


def rotary_table(rope: Rope, layer: int, head_dim: int, tokens: int, length: int, like: Tensor) -> RotaryTable:
    """Tables for positions below `tokens` at least, in the dtype and on the device of `like`; made once per `rope`.

    `length` picks the frequency regime as in `Rope.rotate`. Raises `SkvError` for a rotation that is not of pairs.
    """
    crossing = rope.crossing(layer)
    if crossing is not None and length <= crossing:
        tokens = min(tokens, crossing)  # no position beyond has these frequencies
    key = (rope.regime(layer, length), head_dim, like.dtype, like.device)
    table: RotaryTable | None = rope.derived.get(key)
    if table is None or table.cos.shape[0] < tokens:
        table = rope.derived[key] = _make(rope, layer, head_dim, tokens, max(tokens, length), like)
    return table


def _make(rope: Rope, layer: int, head_dim: int, tokens: int, length: int, like: Tensor) -> RotaryTable:
    device = like.device
    unit = torch.eye(head_dim, device=device)
    # Position 1 turns every pair by an angle that is neither 0 nor a multiple of 90 degrees.
    one = torch.ones(1, dtype=torch.long, device=device)
    turned = rope.rotate(layer, unit[None, None], one, length)[0, 0]
    mixed = (turned - turned.diag().diag()) != 0  # [from, to]
    rotated = mixed.any(dim=0)
    channel = torch.arange(head_dim, device=device)
    if not bool(rotated.any()):  # a layer without rotary embedding: one pair that no channel belongs to
        still = torch.ones(tokens, 1, dtype=like.dtype, device=device)
        none = torch.zeros(head_dim, device=device)
        return RotaryTable(still, torch.zeros_like(still), none.int(), channel.int(), none, Pairing(0, False))
    partner = torch.where(rotated, mixed.int().argmax(dim=0), channel)
    first = rotated & (channel < partner)
    pair = torch.where(rotated, (first.cumsum(0) - 1)[torch.minimum(channel, partner)], 0)
    scale = rope.scale(layer, unit[0])
    ratio = scale / scale[partner]
    sign = torch.where(rotated, torch.where(first, -ratio, ratio), 0.0)

    # A probe that is 1 in the first channel of every pair comes back as cos there, and as sin in the partner.
    positions = torch.arange(tokens, device=device)
    answer = rope.rotate(layer, first.float().expand(1, 1, tokens, head_dim), positions, length)[0, 0]
    second = partner[first]
    ways = pair.int(), partner.int(), sign
    table = RotaryTable(answer[:, first], answer[:, second] / ratio[second], *ways, Pairing.of(*ways))
    if not torch.allclose(table.rotate(unit[None, None], one.expand(1, 1, head_dim)), turned, rtol=1e-5, atol=1e-6):
        raise SkvError("this model's rotary embedding does not turn pairs of channels: use engine=reference")
    return table._replace(cos=table.cos.to(like.dtype), sin=table.sin.to(like.dtype))
