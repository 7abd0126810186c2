"""ShadowKV: low-rank pre-RoPE keys on the device, values on the host, a few chunks rebuilt per step.

Paper: https://arxiv.org/abs/2410.21465. Known differences from the authors' code:
- every selected key is rebuilt from its factors at every step, so a result does not depend on which chunks an
  earlier step happened to hold (their fast path keeps exact keys for as long as a chunk stays selected);
- all prompt chunks but the newest `local` ones are candidates, whatever the prompt's length;
- outlier chunks scale with the budget (24 per 1024 tokens) instead of being 48, or 0 below a budget of 1024;
- chunks are weighed with the model's own softmax scaling (theirs is that of heads of 128 channels, whatever they are);
- the factorisation is by the Gram matrix in fp64 instead of a full SVD;
- generated tokens never run out of room: the newest `window` stay exact, older ones become chunks, projected on
  the prompt's directions. They are not searched for outliers;
- values can be kept in 8 or 4 bits (`values`), which halves or quarters what a step fetches, and beside the keys
  (`offload=none`); factors can be kept in 8 bits (`factors`). Theirs are bf16, and values always on the host;
- several new tokens at once (a second turn) each choose their own chunks, as they would one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes
from shadowkv.contract.engines import uses_fast
from shadowkv.contract.layerwise import LayerState, StepwiseState
from shadowkv.contract.method import LayerKV
from shadowkv.methods.shadowkv.divided import divide, pre_rope
from shadowkv.methods.shadowkv.resident import ResidentLayer
from shadowkv.methods.shadowkv.settings import ShadowKVSettings
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer


@dataclass(frozen=True)
class ShadowKV(ShadowKVSettings):
    """rank: directions kept of a layer's keys · budget: tokens rebuilt per step · chunk: tokens per landmark ·
    local: newest prompt chunks kept exact · outliers: badly summarised chunks kept exact (auto: 24 per 1024 of
    budget) · energy: choose the rank per layer by this share of the squared norm, instead of rank (0: off) ·
    window: newest generated tokens kept exact · values: native, bf16, int8, fp8 or int4 · factors: native, bf16 or
    int8 · offload: host, or none to keep values on the device · engine: reference, fast (what a step needs again stays
    on the device), or auto (fast on a GPU)."""

    name: ClassVar[str] = "shadowkv"
    summary: ClassVar[str] = "low-rank keys on the device, values on the host, landmark-selected chunks rebuilt"
    paper: ClassVar[str] = "2410.21465"
    compared: ClassVar[str | None] = "ByteDance-Seed/ShadowKV@e51904c, 2026-11-25: the same tokens and rebuilt keys"

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        if uses_fast(self.engine, kv.k.device.type):
            return ResidentLayer(self, layer, kv, rope)
        return _ShadowLayer(self, layer, kv, rope)


class _ShadowLayer(StepwiseState):
    """The reference: every chosen chunk is rebuilt and fetched at every step."""

    def __init__(self, method: ShadowKVSettings, layer: int, kv: LayerKV, rope: Rope) -> None:
        self._layer, self._rope = layer, rope
        self._chunk, self._chunks_read = method.chunk, method.budget // method.chunk
        tokens = kv.k.shape[2]
        self._context_tokens = method.context_tokens(tokens)
        self._tail_room = tokens - self._context_tokens + method.window
        self._tokens = tokens
        prompt = divide(method, layer, kv, rope, offload=method.offload == "host")
        self._factors, self._values, self._landmarks = prompt.factors, prompt.values, prompt.landmarks
        self._outlier_k, self._outlier_v = prompt.outlier_k, prompt.outlier_v
        self._tail_k, self._tail_v = TokenBuffer(prompt.tail_k, axis=2), TokenBuffer(prompt.tail_v, axis=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._tail_k.append(k)
        self._tail_v.append(v)
        self._tokens += 1
        if len(self._tail_k) >= self._tail_room + self._chunk:
            self._chunk_oldest_tail()
        exact = [(self._outlier_k, self._outlier_v), (self._tail_k.view, self._tail_v.view)]
        if not len(self._landmarks):
            return ops.attend(q, exact, scaling)
        return ops.attend(q, [self._select(q, scaling), *exact], scaling)

    def _select(self, q: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Keys and values of the chunks that matter most to q, rebuilt and fetched. [B,H,s,D] each."""
        index = self._landmarks.choose(q, self._chunks_read, scaling)
        k = self._rope.rotate(self._layer, self._factors.rebuild(index), index, self._tokens)
        return k, self._values.gather(index)

    def _chunk_oldest_tail(self) -> None:
        """Move the oldest chunk of the tail into the context, as if the prompt had ended after it."""
        keys = self._tail_k.view[:, :, : self._chunk].clone()
        self._factors.append(pre_rope(self._rope, self._layer, keys, self._context_tokens, self._tokens))
        self._values.append(self._tail_v.view[:, :, : self._chunk])
        self._landmarks.append(keys, self._context_tokens // self._chunk)
        self._tail_k.drop_front(self._chunk)
        self._tail_v.drop_front(self._chunk)
        self._context_tokens += self._chunk

    def nbytes(self) -> Bytes:
        buffers = (self._factors, self._landmarks, self._tail_k, self._tail_v)
        exact = self._outlier_k.nbytes + self._outlier_v.nbytes
        return Bytes(exact + sum(b.nbytes() for b in buffers), 0) + self._values.nbytes()
