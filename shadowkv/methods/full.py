"""Full attention: every key and value stays on the device. The reference for accuracy, bytes and speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shadowkv.layerwise import DenseLayer, LayerState, LayerwiseMethod
from shadowkv.method import Bytes, Dims, LayerKV, Method
from shadowkv.rope import Rope


@dataclass(frozen=True)
class Full(LayerwiseMethod):
    """No approximation and no parameters."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "all keys and values, exactly"
    paper: ClassVar[str] = "1706.03762"

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        return DenseLayer(kv.k, kv.v)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        return Bytes(dims.full_bytes_per_token, 0)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return self
