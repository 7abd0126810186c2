"""What ShadowKV's parameters mean: checks, and the bytes and operations that a plan counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from shadowkv.common.dims import Bytes, Dims
from shadowkv.common.names import did_you_mean
from shadowkv.contract.engines import ENGINES, means_fast
from shadowkv.contract.layerwise import LayerwiseMethod
from shadowkv.contract.method import Method, Stages, largest_within, require_rotary
from shadowkv.contract.setting import require
from shadowkv.kernels.slots import Regions
from shadowkv.methods.shadowkv.key_factors import FACTOR_CODINGS
from shadowkv.methods.shadowkv.landmarks import SelectsChunks
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
class ShadowKVSettings(LayerwiseMethod, SelectsChunks):
    """The parameters of ShadowKV and all that follows from them without a tensor: what is kept, moved and computed."""

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
            not self.energy or self.rank == ShadowKVSettings.rank,
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
        return sum(self._read(dims, tokens))

    def stages(self, dims: Dims, tokens: int) -> Stages | None:
        return self._read(dims, tokens) if self.offload == "host" else None

    def _read(self, dims: Dims, tokens: int) -> Stages:
        # Every head rebuilds its own tokens, from rows of the coefficients that all heads share.
        rows = round(dims.kv_heads * self._filled_tokens(dims, tokens) * self._factor_bytes(dims))
        directions = self._largest_rank(dims) * dims.width * dims.element_bytes
        landmarks = self.landmarks(tokens) * (dims.width * dims.element_bytes + dims.kv_heads * 4)
        attended = round(self.attended_tokens(dims, tokens) * dims.full_bytes_per_token)
        return Stages(dims.layers * landmarks, dims.layers * (rows + directions), attended)

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
