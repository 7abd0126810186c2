"""Full attention: every key and value stays on the device. The reference for accuracy, bytes and speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.engines import check_engine, means_fast, uses_fast
from shadowkv.contract.layerwise import DenseLayer, LayerState, LayerwiseMethod
from shadowkv.contract.method import LayerKV, Method
from shadowkv.methods.full.preallocated import ROOM_TOKENS, PreallocatedLayer


@dataclass(frozen=True)
class Full(LayerwiseMethod):
    """engine: reference, fast (buffers with room, one kernel per step, CUDA graphs), or auto (fast on a GPU)."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "all keys and values, exactly"
    paper: ClassVar[str] = "1706.03762"

    engine: str = "auto"

    def __post_init__(self) -> None:
        check_engine(self.name, self.engine)

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        if uses_fast(self.engine, kv.k.device.type, copied=kv.shared):
            return PreallocatedLayer(kv.k, kv.v)
        return DenseLayer(kv.k, kv.v)

    def reference(self) -> Method:
        return replace(self, engine="reference")

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        room = ROOM_TOKENS if means_fast(self.engine, dims.device) else 0
        return {"keys and values": Bytes((tokens + room) * dims.full_bytes_per_token, 0)}

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        return tokens * dims.full_bytes_per_token

    def bytes_per_token(self, dims: Dims) -> Bytes:
        return Bytes(dims.full_bytes_per_token, 0)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return self
