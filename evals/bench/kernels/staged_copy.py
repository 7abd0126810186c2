"""`fill_values` by way of the host, which is what a kernel that reads the host's memory itself is held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shadowkv.tensors.stored import CODINGS, Stored


def staged_copy(stored: Stored, missed: int) -> Callable[[Tensor, Tensor, int, Tensor], None]:
    """`shadowkv.kernels.slots.fill_values` of `stored`, pinned, for `missed` tokens of all heads, as many of each.

    The host is told what is missed, gathers it into pinned memory and sends it; the device decodes and places it.
    """
    pinned = stored.parts[0].is_pinned()
    staging = tuple(torch.empty(missed, part.shape[-1], dtype=part.dtype, pin_memory=pinned) for part in stored.parts)
    tokens = stored.parts[0].shape[2]

    def fill_values(held: Tensor, fill: Tensor, chunk: int, out: Tensor) -> None:
        batch, heads, _ = held.shape
        slot = fill[..., : missed // (batch * heads * chunk)].long()
        offsets = torch.arange(chunk, device=held.device)
        number = held.gather(-1, slot).long()
        index, target = ((x[..., None] * chunk + offsets).flatten(-2) for x in (number, slot))
        # Waits for the device, so nothing is still being sent when it is gathered into again.
        rows = (index.cpu() + tokens * torch.arange(batch * heads).view(batch, heads, 1)).flatten()
        for part, room in zip(stored.parts, staging, strict=True):
            torch.index_select(part.flatten(0, 2), 0, rows, out=room)
        sent = (room.to(out.device, non_blocking=True).view(batch, heads, index.shape[-1], -1) for room in staging)
        x = CODINGS[stored.coding].decode(*sent).to(out.dtype)
        out.scatter_(2, target[..., None].expand(x.shape), x)

    return fill_values
