"""Tokens kept on the host, as they are or in fewer bits, and fetched by index."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from shadowkv.common.dims import Bytes
from shadowkv.common.ranges import ranged
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer
from shadowkv.tensors.pinned import empty_pinned
from shadowkv.tensors.quantise import pack, quantise, unpack
from shadowkv.tensors.stacking import Stackable

_LEAST_SCALE = 2.0**-24  # the smallest number of fp16


class Coding(NamedTuple):
    """How tokens are written: what is stored of them, how to read it, and what it takes."""

    encode: Callable[[Tensor], tuple[Tensor, ...]]  # [B,H,n,D] -> parts [B,H,n,...]
    decode: Callable[..., Tensor]  # the parts of some tokens -> [B,H,s,D]
    token_bytes: Callable[[int, int], int]  # (head size, bytes of a native element) -> bytes of one token and head


def _scaled(x: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """x brought into [-top, top] by one fp16 scale per token and head, and the scale. fp32, fp16 [B,H,n,1].

    x is the scaled one times the scale: of the largest channel in magnitude over `top`, never zero.
    """
    x = x.float()
    largest = torch.finfo(torch.float16).max
    scale = (x.abs().amax(dim=-1, keepdim=True) / top).clamp(_LEAST_SCALE, largest).half()
    return (x / scale.float()).clamp(-top, top), scale


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scale = _scaled(x, 127)
    return scaled.round().to(torch.int8), scale


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scale = _scaled(x, torch.finfo(torch.float8_e4m3fn).max)
    # Held as bytes: gathering is not implemented for fp8 on every device.
    return scaled.to(torch.float8_e4m3fn).view(torch.int8), scale


def int4_group(head_dim: int) -> int:
    """Channels that share a scale and a zero in 4 bits: 32, or as many as divide the head size."""
    return gcd(32, head_dim)


def _to_int4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grouped = x.unflatten(-1, (-1, int4_group(x.shape[-1])))
    codes, scale, zero = quantise(grouped, 4, dims=(-1,))
    return pack(codes.flatten(-2), 4), scale[..., 0], zero[..., 0]


def _from_int4(packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    codes = unpack(packed, 4).unflatten(-1, (scale.shape[-1], -1)).float()
    decoded: Tensor = codes * scale[..., None].float() + zero[..., None].float()
    return decoded.flatten(-2)


def _one_byte(head_dim: int, element_bytes: int) -> int:
    return head_dim + torch.float16.itemsize


def _half_a_byte(head_dim: int, element_bytes: int) -> int:
    return head_dim // 2 + 2 * torch.float16.itemsize * (head_dim // int4_group(head_dim))


CODINGS: dict[str, Coding] = {
    "native": Coding(lambda x: (x,), lambda x: x, lambda head_dim, element_bytes: head_dim * element_bytes),
    "bf16": Coding(lambda x: (x.bfloat16(),), lambda x: x, lambda head_dim, element_bytes: 2 * head_dim),
    "int8": Coding(_to_int8, lambda codes, scale: codes.float() * scale, _one_byte),
    "fp8": Coding(_to_fp8, lambda codes, scale: codes.view(torch.float8_e4m3fn).float() * scale, _one_byte),
    "int4": Coding(_to_int4, _from_int4, _half_a_byte),
}


class Stored(NamedTuple):
    """Tokens as they are kept: the name of their coding, and its parts, [B,H,n,...] each."""

    coding: str
    parts: tuple[Tensor, ...]

    def gather(self, index: Tensor) -> Tensor:
        """The tokens of index [B,H,s] where the index is: they cross over as they are stored. [B,H,s,D]."""
        return CODINGS[self.coding].decode(*(ops.gather_tokens(part, index) for part in self.parts))


class CodedTokens(Stackable):
    """Keys or values [B,H,n,D] on the host; what is fetched crosses over as it is stored, and is decoded there.

    With `offload=False` they stay on the device that computes.
    """

    def __init__(self, x: Tensor, coding: str = "native", offload: bool = True) -> None:
        self._coding = coding
        self._dtype = x.dtype
        self._offload = offload
        parts = CODINGS[coding].encode(x)
        self._parts = tuple(TokenBuffer(to_host(part) if offload else part, axis=2) for part in parts)

    def append(self, x: Tensor) -> None:
        """Add x [B,H,T,D], from any device."""
        for held, new in zip(self._parts, CODINGS[self._coding].encode(x), strict=True):
            held.append(new)

    @property
    def stored(self) -> Stored:
        return Stored(self._coding, tuple(part.view for part in self._parts))

    @ranged("fetch")
    def gather(self, index: Tensor) -> Tensor:
        """The tokens of index [B,H,s], on its device. [B,H,s,D]."""
        return self.stored.gather(index).to(self._dtype)

    @ranged("fetch")
    def fetch_all(self, device: torch.device) -> Tensor:
        """Every token, on `device`. [B,H,n,D]."""
        return CODINGS[self._coding].decode(*(part.view.to(device) for part in self._parts)).to(self._dtype)

    @ranged("rebuild")
    def decode(self) -> Tensor:
        """Every token, where it is kept. [B,H,n,D]."""
        return CODINGS[self._coding].decode(*self.stored.parts).to(self._dtype)

    def nbytes(self) -> Bytes:
        held = sum(part.nbytes() for part in self._parts)
        return Bytes(0, held) if self._offload else Bytes(held, 0)


def to_host(x: Tensor) -> Tensor:
    """x where the host can hold it: pinned memory beside a GPU, in place on a CPU."""
    if x.device.type == "cpu":
        return x
    return empty_pinned(x.shape, x.dtype).copy_(x)
