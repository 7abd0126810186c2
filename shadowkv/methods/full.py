"""Full attention: every key and value stays on the device. The reference for accuracy, bytes and speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from shadowkv import ops
from shadowkv.buffers import TokenBuffer
from shadowkv.method import Bytes, Dims, LayerKV, LayerState, LayerwiseMethod, Method
from shadowkv.rope import Rope


@dataclass(frozen=True)
class Full(LayerwiseMethod):
    """No approximation and no parameters."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "all keys and values, exactly"
    paper: ClassVar[str] = "1706.03762"

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        return _FullLayer(kv)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        return Bytes(dims.full_bytes_per_token, 0)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return self


class _FullLayer(LayerState):
    def __init__(self, kv: LayerKV) -> None:
        # The prompt stays where the prefill put it: two segments cost less than copying the whole cache.
        self._prompt = (kv.k, kv.v)
        self._new_k = TokenBuffer(kv.k[:, :, :0], axis=2)
        self._new_v = TokenBuffer(kv.v[:, :, :0], axis=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._new_k.append(k)
        self._new_v.append(v)
        return ops.attend(q, [self._prompt, (self._new_k.view, self._new_v.view)], scaling)

    def nbytes(self) -> Bytes:
        prompt = sum(x.numel() * x.element_size() for x in self._prompt)
        return Bytes(prompt + self._new_k.nbytes() + self._new_v.nbytes(), 0)
