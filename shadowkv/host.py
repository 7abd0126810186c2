"""Tokens kept on the host, as they are or in 8 bits, and fetched by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shadowkv import ops
from shadowkv.buffers import TokenBuffer
from shadowkv.ranges import ranged
from shadowkv.stacking import Stackable


class Coding(NamedTuple):
    """How tokens are written: what is stored of them, how to read it, and what it takes."""

    encode: Callable[[Tensor], tuple[Tensor, ...]]  # [B,H,n,D] -> parts [B,H,n,...]
    decode: Callable[..., Tensor]  # the parts of some tokens -> [B,H,s,D]
    token_bytes: Callable[[int, int], int]  # (head size, bytes of a native element) -> bytes of one token and head


def _scaled(x: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """x brought into [-top, top] by one fp16 scale per token and head, and the scale. fp32, fp16 [B,H,n,1]."""
    x = x.float()
    largest = torch.finfo(torch.float16).max
    scale = (x.abs().amax(dim=-1, keepdim=True) / top).clamp(max=largest).half()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a token of zeros
    return (x / scale.float()).clamp(-top, top), scale


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scale = _scaled(x, 127)
    return scaled.round().to(torch.int8), scale


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scale = _scaled(x, torch.finfo(torch.float8_e4m3fn).max)
    # Held as bytes: gathering is not implemented for fp8 on every device.
    return scaled.to(torch.float8_e4m3fn).view(torch.int8), scale


def _one_byte(head_dim: int, element_bytes: int) -> int:
    return head_dim + torch.float16.itemsize


CODINGS: dict[str, Coding] = {
    "native": Coding(lambda x: (x,), lambda x: x, lambda head_dim, element_bytes: head_dim * element_bytes),
    "int8": Coding(_to_int8, lambda codes, scale: codes.float() * scale, _one_byte),
    "fp8": Coding(_to_fp8, lambda codes, scale: codes.view(torch.float8_e4m3fn).float() * scale, _one_byte),
}


class HostTokens(Stackable):
    """Keys or values [B,H,n,D] on the host; what is fetched crosses over as it is stored, and is decoded there."""

    def __init__(self, x: Tensor, coding: str = "native") -> None:
        self._coding = CODINGS[coding]
        self._dtype = x.dtype
        self._parts = tuple(TokenBuffer(to_host(part), axis=2) for part in self._coding.encode(x))

    def append(self, x: Tensor) -> None:
        """Add x [B,H,T,D], from any device."""
        for held, new in zip(self._parts, self._coding.encode(x), strict=True):
            held.append(new)

    @ranged("fetch")
    def gather(self, index: Tensor) -> Tensor:
        """The tokens of index [B,H,s], on its device. [B,H,s,D]."""
        return self._coding.decode(*(ops.gather_tokens(part.view, index) for part in self._parts)).to(self._dtype)

    @ranged("fetch")
    def fetch_all(self, device: torch.device) -> Tensor:
        """Every token, on `device`. [B,H,n,D]."""
        return self._coding.decode(*(part.view.to(device) for part in self._parts)).to(self._dtype)

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self._parts)


def to_host(x: Tensor) -> Tensor:
    """x where the host can hold it: pinned memory beside a GPU, in place on a CPU."""
    if x.device.type == "cpu":
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x)
