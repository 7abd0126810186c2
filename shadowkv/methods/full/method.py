"""Full attention: every key and value stays on the device. The reference for accuracy, bytes and speed.

In 8 bits (`kv=int8`, `kv=fp8`) it is what a cache of few tokens has to beat where it would be used: nothing is left
out, and a step reads half. Each token and head has one scale for its key and one for its value, the largest channel in
magnitude over 127 or over 448 (e4m3fn), in fp16: x is its code times the scale. A token's codes hang on no other token,
whenever and with whatever it comes, and scales can stay outside of products with codes. Codes are made with the rounded
scale, which is never zero. docs/methods/full.md says how far off this is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.common.names import did_you_mean
from shadowkv.contract.engines import check_engine, means_fast, uses_fast
from shadowkv.contract.layerwise import DenseLayer, LayerState, LayerwiseMethod
from shadowkv.contract.method import LayerKV, Method
from shadowkv.contract.setting import require
from shadowkv.methods.full.coded import CodedLayer
from shadowkv.methods.full.preallocated import ROOM_TOKENS, PreallocatedLayer
from shadowkv.tensors.stored import CODINGS

_KV = ("native", "int8", "fp8")


@dataclass(frozen=True)
class Full(LayerwiseMethod):
    """kv: native (as keys and values come), int8 or fp8 · engine: reference, fast (buffers with room, one kernel per
    step, CUDA graphs), or auto (fast on a GPU)."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "all keys and values, exactly or in 8 bits"
    paper: ClassVar[str] = "1706.03762"

    kv: str = "native"
    engine: str = "auto"

    def __post_init__(self) -> None:
        check_engine(self.name, self.engine)
        known = f"full: kv={self.kv} is unknown{did_you_mean(self.kv, _KV)}; one of {', '.join(_KV)}"
        require(self.kv in _KV, known)

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        native = self.kv == "native"
        # Codes are a copy under either engine.
        if uses_fast(self.engine, kv.k.device.type, copied=kv.shared and native):
            return PreallocatedLayer(kv.k, kv.v, self.kv)
        return DenseLayer(kv.k, kv.v) if native else CodedLayer(kv.k, kv.v, self.kv)

    def reference(self) -> Method:
        return replace(self, engine="reference")

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        room = ROOM_TOKENS if means_fast(self.engine, dims.device) else 0
        held = "keys and values" if self.kv == "native" else "codes and scales"
        return {held: Bytes((tokens + room) * self._token_bytes(dims), 0)}

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        decodes = self.kv != "native" and not means_fast(self.engine, dims.device)
        return 2 * tokens * dims.width * dims.element_bytes if decodes else 0

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        return tokens * self._token_bytes(dims)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        return Bytes(self._token_bytes(dims), 0)

    def _token_bytes(self, dims: Dims) -> int:
        """Keys and values of one token in all layers."""
        of_head = CODINGS[self.kv].token_bytes(dims.head_dim, dims.element_bytes)
        return 2 * dims.layers * dims.kv_heads * of_head

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return replace(self, kv="native")
