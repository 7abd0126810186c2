"""Integer codes for keys and values: asymmetric min/max quantisation of small blocks, packed into bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.tensors.buffers import TokenBuffer
from shadowkv.tensors.stacking import Stackable

_HALF_MAX = torch.finfo(torch.float16).max


def quantise(x: Tensor, bits: int, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x with one scale and zero per slice along `dims`: x ~ codes * scale + zero.

    Returns codes (uint8, one per element), scale and zero (fp16, `dims` kept with size 1). Codes are made from the
    rounded scale and zero, the ones that will decode them. Values beyond the range of fp16 are clipped to it.
    """
    x = x.float()
    top = 2**bits - 1
    zero = x.amin(dim=dims, keepdim=True).clamp(-_HALF_MAX, _HALF_MAX).half()
    scale = ((x.amax(dim=dims, keepdim=True) - zero.float()) / top).clamp(max=_HALF_MAX).half()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a constant slice has no range to divide by
    codes = ((x - zero.float()) / scale.float()).round().clamp(0, top)
    return codes.to(torch.uint8), scale, zero


def pack(codes: Tensor, bits: int) -> Tensor:
    """Put 8 / bits neighbours of the last axis into one byte, the first one lowest. [..., n] -> [..., n * bits / 8]."""
    by_byte = codes.unflatten(-1, (codes.shape[-1] * bits // 8, 8 // bits))
    shifted: Tensor = by_byte << _shifts(bits, codes.device)
    return shifted.sum(dim=-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    codes: Tensor = (packed[..., None] >> _shifts(bits, packed.device)) & (2**bits - 1)
    return codes.flatten(-2)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


class QuantisedTokens(Stackable):
    """Keys or values [B,H,n,D] as packed codes; blocks of tokens x channels share a scale and a zero.

    Whole blocks of tokens are appended, so what is held never depends on how the tokens arrived.
    """

    def __init__(self, x: Tensor, bits: int, block_tokens: int, block_channels: int) -> None:
        self._bits = bits
        self._block = block_tokens, block_channels
        self._dtype = x.dtype
        self._parts = tuple(TokenBuffer(part, axis=2) for part in self._encode(x))

    def append(self, x: Tensor) -> None:
        """Add x [B,H,T,D], T a multiple of a block's tokens."""
        for held, new in zip(self._parts, self._encode(x), strict=True):
            held.append(new)

    @ranged("rebuild")
    def decode(self) -> Tensor:
        """All tokens, [B,H,n,D]."""
        packed, scale, zero = (part.view for part in self._parts)
        codes = self._blocked(unpack(packed, self._bits)).float()
        scale, zero = scale[:, :, :, None, :, None].float(), zero[:, :, :, None, :, None].float()
        return (codes * scale + zero).to(self._dtype).flatten(4, 5).flatten(2, 3)

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self._parts)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scale, zero = quantise(self._blocked(x), self._bits, dims=(3, 5))
        return pack(codes.flatten(4, 5).flatten(2, 3), self._bits), scale[:, :, :, 0, :, 0], zero[:, :, :, 0, :, 0]

    def _blocked(self, x: Tensor) -> Tensor:
        """[B,H,n,D] -> [B,H,n/t,t,D/c,c]."""
        block_tokens, block_channels = self._block
        batch, heads, tokens, channels = x.shape
        blocks = tokens // block_tokens, channels // block_channels
        return x.reshape(batch, heads, blocks[0], block_tokens, blocks[1], block_channels)
