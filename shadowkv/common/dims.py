"""What bytes and geometry are counted in, of the layers that a method serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Bytes(NamedTuple):
    """Memory held, in bytes, on the device that computes and on the host."""

    device: int
    host: int

    def __add__(self, other: Bytes) -> Bytes:  # type: ignore[override]
        return Bytes(self.device + other.device, self.host + other.host)


@dataclass(frozen=True)
class KVLayer:
    """One layer of keys and values of a model: its heads, and who sees it."""

    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None  # the sliding window, None for a layer that sees everything
    shared: bool = False  # later layers attend to these keys and values too

    @property
    def served(self) -> bool:
        """Whether a method may keep it in its own way; the others stay dense."""
        return self.window is None and not self.shared

    def token_bytes(self, element_bytes: int) -> int:
        """Dense keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True)
class Dims:
    """Geometry of the attention layers that a method serves (see `KVLayer.served`)."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    served: tuple[int, ...] | None = None  # numbers of the layers counted, where they are not the first ones
    device: str = "cpu"  # type of the device that decodes: some methods keep more on a GPU
    rotary: bool = True  # whether it is known how positions turn the keys

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The model's layer numbers that these dimensions speak of."""
        return tuple(range(self.layers)) if self.served is None else self.served

    @property
    def width(self) -> int:
        """W = H * D, the width of one token's keys in one layer."""
        return self.kv_heads * self.head_dim

    def layers_from(self, first: int) -> int:
        """How many of these layers have the number `first` or a higher one."""
        return sum(layer >= first for layer in self.layer_ids)

    def lists(self, reduce: str) -> int:
        """Lists of tokens that a layer chooses under a group reduction: one per query head, or per KV head."""
        return self.q_heads if reduce == "per_q_head" else self.kv_heads

    def gathered_bytes(self, reduce: str, read: int, tokens: int) -> int:
        """Keys and values that a layer copies to attend to `read` of `tokens` per list; 0 if it reads all in place."""
        return 2 * self.lists(reduce) * read * self.head_dim * self.element_bytes if read <= tokens else 0

    @property
    def full_bytes_per_token(self) -> int:
        """Dense keys and values of one token in all layers."""
        return 2 * self.layers * self.width * self.element_bytes

    @property
    def query_bytes_per_token(self) -> int:
        """Queries of one token in all layers, which a prefill keeps where `Method.needs_prompt_queries`."""
        return self.layers * self.q_heads * self.head_dim * self.element_bytes
