"""KIVI: 2- or 4-bit keys per channel, 2- or 4-bit values per token, the newest tokens in full precision.

Paper: https://arxiv.org/abs/2402.02750. Known differences from the authors' code:
- a group whose elements are all equal is kept (theirs divides by a range of zero and gives NaN);
- scales and zeros are fp16 for any type of model, and codes are chosen with the rounded ones;
- tokens are decoded to the model's type before an ordinary product; there is no fused kernel, so decoding is slower
  than full attention here, while the bytes held are those of the packed codes;
- several new tokens at once each see what they would have seen one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.layerwise import LayerState, LayerwiseMethod, StepwiseState
from shadowkv.contract.method import LayerKV, Method, largest_within
from shadowkv.contract.setting import require
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer
from shadowkv.tensors.quantise import QuantisedTokens

_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Kivi(LayerwiseMethod):
    """bits: 2, 4 or 8 per element · group: elements that share a scale and a zero (tokens of a channel for keys,
    channels of a token for values) · residual: newest tokens kept in full precision."""

    name: ClassVar[str] = "kivi"
    summary: ClassVar[str] = "all tokens in 2 or 4 bits, the newest ones in full precision"
    paper: ClassVar[str] = "2402.02750"
    compared: ClassVar[str | None] = "jy-yuan/KIVI@876b4d2, 2026-11-25: the same answers but for scales in fp16"

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        require(self.bits in _BITS, f"kivi: bits must be 2, 4 or 8, got {self.bits}")
        require(self.group >= 1, f"kivi: group must be at least 1, got {self.group}")
        require(
            self.residual >= self.group and self.residual % self.group == 0,
            f"kivi: residual={self.residual} must be a multiple of group={self.group}",
        )

    def check(self, dims: Dims) -> None:
        require(
            dims.head_dim % self.group == 0,
            f"kivi: group={self.group} does not divide this model's head size of {dims.head_dim}",
        )
        require(
            dims.head_dim * self.bits % 8 == 0,
            f"kivi: {dims.head_dim} channels of {self.bits} bits do not fill whole bytes",
        )

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        return _KiviLayer(self, kv)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        scale_and_zero = 2 * torch.float16.itemsize
        return Bytes(round(2 * dims.layers * dims.width * (self.bits / 8 + scale_and_zero / self.group)), 0)

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        # Keys leave the residual all at once when it is full, values one by one.
        exact = tokens % self.residual + min(tokens, self.residual)
        return {
            "codes, scales and zeros": Bytes((2 * tokens - exact) * self.bytes_per_token(dims).device // 2, 0),
            "newest tokens": Bytes(exact * dims.full_bytes_per_token // 2, 0),
        }

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        return 2 * tokens * dims.width * dims.element_bytes

    def with_kv_bytes(self, dims: Dims, tokens: int, kv_bytes: int) -> Method:
        return largest_within(lambda n: replace(self, bits=_BITS[n]), 0, len(_BITS) - 1, dims, tokens, kv_bytes)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        group = math.gcd(self.group, dims.head_dim)
        return replace(self, group=group, residual=(tokens // group + 1) * group)


class _KiviLayer(StepwiseState):
    """Keys leave the residual all at once when it is full; values one by one, when it overflows."""

    def __init__(self, method: Kivi, kv: LayerKV) -> None:
        self._residual = method.residual
        tokens = kv.k.shape[2]
        old_k, old_v = tokens - tokens % method.residual, max(tokens - method.residual, 0)
        self._old_k = QuantisedTokens(kv.k[:, :, :old_k], method.bits, method.group, 1)
        self._old_v = QuantisedTokens(kv.v[:, :, :old_v], method.bits, 1, method.group)
        self._new_k = TokenBuffer(kv.k[:, :, old_k:], axis=2)
        self._new_v = TokenBuffer(kv.v[:, :, old_v:], axis=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._new_k.append(k)
        self._new_v.append(v)
        keys = torch.cat((self._old_k.decode(), self._new_k.view), dim=2)
        values = torch.cat((self._old_v.decode(), self._new_v.view), dim=2)
        out = ops.attend(q, [(keys, values)], scaling)
        if len(self._new_k) == self._residual:
            self._old_k.append(self._new_k.view)
            self._new_k.drop_front(self._residual)
        if len(self._new_v) > self._residual:
            self._old_v.append(self._new_v.view[:, :, :1])
            self._new_v.drop_front(1)
        return out

    def nbytes(self) -> Bytes:
        parts = (self._old_k, self._old_v, self._new_k, self._new_v)
        return Bytes(sum(part.nbytes() for part in parts), 0)
