"""How a layer turns its keys, found by trying: which channels, by which function, and what is multiplied afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# (x [N,1,T,d], cos, sin [N,T,r]) -> like x
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


class Form(NamedTuple):
    """The first `channels` are turned by `turn`. Where a norm with weights follows the rotation (HunYuan), `scale`
    [D] is what each channel is multiplied by after it, in relation to its partner."""

    channels: int
    turn: Turn
    scale: Tensor | None = None

    def turned(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """k [B,H,T,D] at the positions of cos and sin [B,H,T,r] or broadcastable, as if it had been at 0."""
        if not self.channels:
            return k
        scale = None if self.scale is None else self.scale.to(k.device, torch.float32)
        x = k if scale is None else k / scale
        # The modeling functions take one position per (batch, token), so heads are folded into the batch.
        batch, heads, tokens, head_dim = x.shape
        flat = x.reshape(batch * heads, 1, tokens, head_dim)
        cos, sin = (part.expand(batch, heads, tokens, -1).flatten(0, 1) for part in (cos, sin))
        turned = self.turn(flat[..., : self.channels], cos, sin)
        if self.channels < head_dim:
            turned = torch.cat((turned, flat[..., self.channels :]), dim=-1)
        turned = turned.reshape(batch, heads, tokens, head_dim)
        return (turned if scale is None else turned * scale).to(k.dtype)


def still(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """No rotation at all."""
    return x


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels as one complex number each (Llama 4, whose frequencies are complex numbers too)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2)


def turn_of(module: Any) -> Turn | None:
    """A modeling module's own way to turn keys, whether it takes them alone or after queries."""
    apply = getattr(module, "apply_rotary_pos_emb", None)
    if apply is None:
        return None
    if "k" not in inspect.signature(apply).parameters:
        return lambda x, cos, sin: apply(x, cos, sin)
    # Without heads, since only one tensor is to be rotated.
    return lambda x, cos, sin: apply(x, x[:, :0], cos, sin)[0]


def fitting(keys: Tensor, cos: Tensor, sin: Tensor, turn: Turn | None, tolerance: float) -> Form | None:
    """The form by which keys at position 0 become those at the others, None where there is none.

    keys [R,H,T,D] fp32 of one token per row at T positions, cos and sin [T,r] there. tolerance: by how much keys may
    differ from what the form makes of the first ones, in relation to their size.
    """
    # At position 0 there is no more than the factor of YaRN and longrope.
    cos, sin = cos / cos[:1], sin / cos[:1]
    head_dim, forms = keys.shape[-1], [Form(0, still)]
    if turn is not None:
        forms += [Form(channels, turn) for channels in dict.fromkeys((head_dim, min(cos.shape[-1], head_dim)))]
    misses = [_miss(form, keys, cos, sin) for form in forms]
    if min(misses) <= tolerance:
        return forms[misses.index(min(misses))]
    # Only now, since a scale would also fit the rounding of a form without one.
    scaled = None if turn is None else _scaled(Form(head_dim, turn), keys, cos, sin)
    return scaled if scaled is not None and _miss(scaled, keys, cos, sin) <= tolerance else None


def _miss(form: Form, keys: Tensor, cos: Tensor, sin: Tensor) -> float:
    try:
        made = form.turned(keys[:, :, :1].expand(keys.shape), cos, sin)
    except RuntimeError:  # a function for keys of another shape
        return torch.inf
    return float((made - keys).norm() / keys.norm())


def _scaled(form: Form, keys: Tensor, cos: Tensor, sin: Tensor) -> Form | None:
    """`form` with the scale that fits the keys best: y_d = x_d cos + x_partner(d) sin scale_d / scale_partner(d)."""
    head_dim = keys.shape[-1]
    unit = torch.eye(head_dim, device=keys.device)[None, None]
    try:
        # Row e of `matrix[t]` is what becomes of channel e at position t.
        turned = [form.turned(unit, c, s)[0, 0] for c, s in zip(cos, sin, strict=True)]
    except RuntimeError:
        return None
    matrix = torch.stack(turned)
    own = matrix.diagonal(dim1=1, dim2=2)  # [T,D]
    partner = (matrix[1] - own[1].diag()).abs().argmax(dim=0)
    cross = matrix[:, partner, torch.arange(head_dim, device=keys.device)]
    first = keys[:, :, :1]
    share, rest = cross * first[..., partner], keys - own * first
    ratio = (share * rest).sum(dim=(0, 1, 2)) / share.square().sum(dim=(0, 1, 2)).clamp_min(1e-12)
    leads = torch.arange(head_dim, device=keys.device) < partner
    return form._replace(scale=torch.where(leads & (ratio != 0), ratio, 1.0))
