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

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.common.names import did_you_mean
from shadowkv.contract.engines import ENGINES, means_fast, uses_fast
from shadowkv.contract.layerwise import LayerState, LayerwiseMethod, StepwiseState
from shadowkv.contract.method import LayerKV, Method, largest_within, require, require_rotary
from shadowkv.kernels.slots import Regions
from shadowkv.methods.shadowkv.divided import divide, pre_rope
from shadowkv.methods.shadowkv.key_factors import FACTOR_CODINGS
from shadowkv.methods.shadowkv.landmarks import SelectsChunks
from shadowkv.methods.shadowkv.resident import ResidentLayer
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer
from shadowkv.tensors.stored import CODINGS

# Chunks of a step that the step before had chosen too, as the authors report it (paper, section 4.2): for planning the
# fast engine, which does not fetch them again.
HIT_RATE = 0.6
_CHOICES: dict[str, tuple[str, ...]] = {
    "values": tuple(CODINGS),
    "factors": FACTOR_CODINGS,
    "offload": ("host", "none"),
    "engine": ENGINES,
}


@dataclass(frozen=True)
class ShadowKV(LayerwiseMethod, SelectsChunks):
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

    rank: int = 160
    energy: float = 0.0
    window: int = 128
    values: str = "native"
    factors: str = "native"
    offload: str = "host"
    engine: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, f"shadowkv: rank must be at least 1, got {self.rank}")
        require(self.window >= 1, f"shadowkv: window must be at least 1, got {self.window}")
        require(0 <= self.energy <= 1, f"shadowkv: energy={self.energy} is not in [0, 1]")
        require(
            not self.energy or self.rank == ShadowKV.rank,
            "shadowkv: give either rank or energy, not both",
        )
        for name, known in _CHOICES.items():
            asked = getattr(self, name)
            meant = f"{did_you_mean(asked, known)}; one of {', '.join(known)}"
            require(asked in known, f"shadowkv: {name}={asked} is unknown{meant}")

    @property
    def cost_follows_text(self) -> bool:
        return bool(self.energy)

    def check(self, dims: Dims) -> None:
        require_rotary(dims, self.name)
        require(
            bool(self.energy) or self.rank <= dims.width,
            f"shadowkv: rank={self.rank} exceeds the width of this model's keys, {dims.width} "
            f"({dims.kv_heads} KV heads of {dims.head_dim}); give rank={dims.width} or less",
        )
        require(
            self.values != "int4" or dims.head_dim % 2 == 0,
            f"shadowkv: values=int4 packs two channels into a byte, and this model's heads have {dims.head_dim}",
        )

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        if uses_fast(self.engine, kv.k.device.type):
            return ResidentLayer(self, layer, kv, rope)
        return _ShadowLayer(self, layer, kv, rope)

    def reference(self) -> Method:
        return replace(self, engine="reference", values="native")

    def bytes_per_token(self, dims: Dims) -> Bytes:
        per_layer = self._factor_bytes(dims) + (dims.width * dims.element_bytes + dims.kv_heads * 4) / self.chunk
        values = dims.layers * dims.kv_heads * self._value_bytes(dims)
        keys = round(dims.layers * per_layer)
        return Bytes(keys, values) if self.offload == "host" else Bytes(keys + values, 0)

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        fast = means_fast(self.engine, dims.device)
        context, landmarks = self.context_tokens(tokens), self.landmarks(tokens)
        valued = context + (self.room_tokens(self.offload == "host") if fast else 0)
        if fast:
            context, landmarks = context + self.room_tokens(False), landmarks + self.room_tokens(False) // self.chunk
        exact = self.regions.outliers + self.regions.ring if fast else self.exact_tokens(tokens)
        rank = self._largest_rank(dims)
        directions = rank * dims.width
        if self.factors == "int8":
            directions += rank * dims.width  # what projects is not what rebuilds
        number_bytes = 4  # which chunk a landmark or a slot stands for
        landmark = dims.width * dims.element_bytes + dims.kv_heads * number_bytes
        values = dims.layers * valued * dims.kv_heads * self._value_bytes(dims)
        parts = {
            "factors": Bytes(dims.layers * (context * self._factor_bytes(dims) + directions * dims.element_bytes), 0),
            "landmarks": Bytes(dims.layers * landmarks * landmark, 0),
            "outlier and local tokens": Bytes(exact * dims.full_bytes_per_token, 0),
            "values": Bytes(0, values) if self.offload == "host" else Bytes(values, 0),
        }
        if fast:
            slots = self.budget // self.chunk * dims.layers * dims.kv_heads * number_bytes
            parts["resident chunks"] = Bytes(self.regions.slots * dims.full_bytes_per_token + slots, 0)
        return parts

    @property
    def regions(self) -> Regions:
        """What the fast engine's buffers hold: chosen chunks, outliers, and a ring for the newest tokens."""
        newest = (self.local + 1) * self.chunk - 1 + self.window
        chosen = self.budget // self.chunk * self.chunk
        return Regions(chosen, self.outlier_chunks * self.chunk, newest + self.chunk - 1)

    def room_tokens(self, on_host: bool) -> int:
        """Room for generated tokens that the fast engine keeps beside a prompt's context, in whole chunks.

        Host memory is slow to copy when it is used up, device memory is scarce.
        """
        return -(-(1024 if on_host else 128) // self.chunk) * self.chunk

    def _filled_tokens(self, dims: Dims, tokens: int) -> float:
        """Of the tokens chosen in a step, those that have to be fetched and rebuilt, per head."""
        found = HIT_RATE if means_fast(self.engine, dims.device) else 0.0
        return (1 - found) * self.chosen_tokens(tokens)

    def _largest_rank(self, dims: Dims) -> int:
        # With `energy` the rank depends on the prompt; the full width is its upper bound.
        return dims.width if self.energy else self.rank

    def _factor_bytes(self, dims: Dims) -> int:
        """Of one token in one layer."""
        return CODINGS[self.factors].token_bytes(self._largest_rank(dims), dims.element_bytes)

    def _value_bytes(self, dims: Dims) -> int:
        """Of one token and head."""
        return CODINGS[self.values].token_bytes(dims.head_dim, dims.element_bytes)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        chunks = self.budget // self.chunk + self.outlier_chunks + self.local
        # Of later tokens the newest stay exact, and the others become chunks to choose from.
        exact = tokens % self.chunk + min(later, self.window + self.chunk - 1)
        return min(tokens + later, chunks * self.chunk + exact)

    def bus_bytes(self, dims: Dims, tokens: int) -> int:
        fetched = dims.layers * dims.kv_heads * self._filled_tokens(dims, tokens) * self._value_bytes(dims)
        return round(fetched) if self.offload == "host" else 0

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        if means_fast(self.engine, dims.device):
            scores_bytes = 4
            return (dims.q_heads + dims.kv_heads) * self.landmarks(tokens) * scores_bytes
        return 2 * self.chosen_tokens(tokens) * dims.width * dims.element_bytes

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        # Every head rebuilds its own tokens, from rows of the coefficients that all heads share.
        rows = round(dims.kv_heads * self._filled_tokens(dims, tokens) * self._factor_bytes(dims))
        directions = self._largest_rank(dims) * dims.width * dims.element_bytes
        landmarks = self.landmarks(tokens) * (dims.width * dims.element_bytes + dims.kv_heads * 4)
        attended = round(self.attended_tokens(dims, tokens) * dims.full_bytes_per_token)
        return dims.layers * (rows + directions + landmarks) + attended

    def step_flop(self, dims: Dims, tokens: int) -> int:
        scored = dims.q_heads * self.landmarks(tokens)
        rebuilt = dims.kv_heads * self._filled_tokens(dims, tokens) * self._largest_rank(dims)
        return super().step_flop(dims, tokens) + round(2 * dims.layers * dims.head_dim * (scored + rebuilt))

    def with_budget(self, tokens: int) -> Method:
        return self.within_budget(tokens)

    def with_kv_bytes(self, dims: Dims, tokens: int, kv_bytes: int) -> Method:
        return largest_within(lambda n: replace(self, rank=n, energy=0.0), 1, dims.width, dims, tokens, kv_bytes)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        budget = -(-tokens // self.chunk) * self.chunk
        exact: dict[str, Any] = {"energy": 0.0, "values": "native", "factors": "native"}
        return replace(self, rank=dims.width, budget=budget, outliers=2, window=16, **exact)


class _ShadowLayer(StepwiseState):
    """The reference: every chosen chunk is rebuilt and fetched at every step."""

    def __init__(self, method: ShadowKV, layer: int, kv: LayerKV, rope: Rope) -> None:
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
