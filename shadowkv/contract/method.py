"""The contract between the engine and a KV-cache method.

A *method* is a frozen dataclass of hyper-parameters. It makes a `DecodeCache`, which is fed one dense prefill
(`ingest`, once per layer) and then answers attention for new tokens (`attend`). Keys and queries always arrive
after RoPE, as transformers hands them over; a batch is uniform (ragged batches become one cache per row).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self, cast

from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.common.errors import SkvError
from shadowkv.contract.setting import Setting, require
from shadowkv.contract.sparse_prefill import SparsePrefill
from shadowkv.tensors.pinned import HostRows

OBSERVED_QUERIES = 64  # last queries of a prompt that every method is given


class LayerKV(NamedTuple):
    """One layer of a dense prefill; read-only."""

    k: Tensor  # [B,H,S,D] post-RoPE
    v: Tensor  # [B,H,S,D]
    q_tail: Tensor  # [B,Hq,min(OBSERVED_QUERIES,S),D] the last queries, post-RoPE (observation-window methods)
    scaling: float  # the model's own softmax scaling
    q_all: Tensor | None = None  # [B,Hq,S,D] all queries, post-RoPE, where `Method.needs_prompt_queries`
    shared: bool = False  # the prompt stays with others too: what is copied of it is held twice
    depth: float = 0.5  # place among the layers served: 0 the first, 1 the last, 0.5 the only one
    made_up: bool = False  # keys and values are noise, and what would be fitted to them may be made up too
    host_rows: HostRows | None = None  # places on the host, of a batch that the prompt will be a row of


def depth_of(place: int, layers: int) -> float:
    """`LayerKV.depth` of the layer at `place` of `layers` served."""
    return place / (layers - 1) if layers > 1 else 0.5


class Stages(NamedTuple):
    """Device memory that a step reads around a fetch from the host, over all layers, in a batch of one."""

    choosing: int  # what crosses
    rebuilding: int  # what does not cross of what was chosen
    attending: int


# guess(layer) -> [B,Hq,T,D]: the queries, after RoPE, that a layer would make of its predecessor's input.
Guess = Callable[[int], Tensor]


class DecodeCache(ABC):
    """What one method keeps of one prompt, over all layers that it serves."""

    @abstractmethod
    def ingest(self, layer: int, kv: LayerKV) -> None:
        """Take over one layer of the prefill. May keep references to `kv`, must not write to it."""

    def complete(self) -> None:  # noqa: B027 - most caches need only one layer at a time
        """Every layer has been ingested: what depends on several layers is decided here, before any `attend`."""

    def foresee(self, guess: Guess) -> None:  # noqa: B027 - only methods that speculate ask
        """Take the guesser of a method that `speculates`: usable within `attend`, for the layer that it serves."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Append T new tokens and attend causally to everything this method kept.

        q [B,Hq,T,D], k and v [B,H,T,D], at the positions that follow those held. Returns [B,Hq,T,D]. T tokens at
        once give what T calls with one token each give.
        """

    @abstractmethod
    def nbytes(self) -> Bytes:
        """Bytes of every tensor this cache keeps alive, exactly (shared views of the prefill included)."""

    def resident_chunks(self) -> Sequence[Tensor]:
        """Chunks of a larger store that a step finds on the device, by layer: numbers by slot, -1 for none, [B,H,S]."""
        return ()

    def chunk_numbers(self) -> Sequence[Tensor]:
        """Chunks that a step chooses from, by layer as `resident_chunks`: numbers by landmark, [B,H,C].

        What is written there decides which chunks a landmark stands for: of use with keys that mean nothing.
        """
        return ()

    @classmethod
    def join(cls, rows: list[Self]) -> Sequence[DecodeCache]:
        """Caches of one row each, in as few caches as can hold them, in order. `rows` cannot be used afterwards.

        What is returned shows no views of a prefill beyond what it holds. As they are, rows run one after the other.
        """
        return rows

    def pick(self, rows: list[int]) -> DecodeCache:
        """A cache of these rows of a batch alone. Raises `SkvError` where rows cannot be parted."""
        raise SkvError(f"rows of a batch of {type(self).__name__} cannot be parted")

    def reserve(self, tokens: int) -> None:  # noqa: B027 - most caches grow by a little whenever they have to
        """Make room for this many more tokens per row at once: until they came, nothing moves any more."""

    @property
    def steady(self) -> bool:
        """Whether one token per row is a fixed sequence of operations on tensors that stay, as told from here on."""
        return False

    def make_room(self) -> bool:
        """What the host does before `run` takes one token per row; True if tensors moved."""
        raise NotImplementedError

    @property
    def rearranges(self) -> bool:
        """Whether `rearrange` has to come between `make_room` and `run` this time."""
        return False

    def rearrange(self) -> None:
        """Put in order what some steps leave to be: a sequence of operations of its own, as fixed as that of `run`.

        Rows for which it is not the time stay as they are.
        """
        raise NotImplementedError

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """`attend` for one token per row, after these; never waits for the device: a CUDA graph can hold it."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 - most caches have nothing but tensors to let go
        """Release streams, pinned memory and the like."""


@dataclass(frozen=True)
class Method(Setting, ABC):
    """A KV-cache method."""

    calibration: ClassVar[str | None] = None  # the parameter that names what `skv calibrate` made of a model

    @property
    def core(self) -> Method:
        """The method that decodes: this one, or the one that it only adds something to."""
        return self

    def with_engine(self, engine: str) -> Method:
        """This method in one of its implementations (`shadowkv.contract.engines`), if it has several."""
        changed: Any = self
        return cast("Method", replace(changed, engine=engine)) if "engine" in self.params() else self

    def reference(self) -> Method:
        """The same choice of tokens by an implementation that takes values of any width."""
        return self

    @property
    def needs_prompt_queries(self) -> bool:
        """Whether it needs `LayerKV.q_all`: Hq * D elements per prompt token and layer, G/2 of the keys and values."""
        return False

    @property
    def speculates(self) -> bool:
        """Whether its caches are to be given a `Guess`."""
        return False

    @property
    def cost_follows_text(self) -> bool:
        """Whether what a step reads, or what is kept, depends on the prompt: made-up keys then give wrong costs."""
        return self.speculates

    @property
    def prefill(self) -> SparsePrefill | None:
        """How the prompt is computed before this method takes it over; None is densely."""
        return None

    @abstractmethod
    def new_state(self, rope: Rope) -> DecodeCache:
        """A fresh, empty cache of this method."""

    @abstractmethod
    def bytes_per_token(self, dims: Dims) -> Bytes:
        """What one more prompt token costs in a batch of one, over all layers (constant terms left out)."""

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        """What is held of a prompt of this length in a batch of one, by name: all that `nbytes()` counts after it.

        The largest number, where it depends on the text.
        """
        return {"keys and values": Bytes(*(tokens * held for held in self.bytes_per_token(dims)))}

    def prompt_bytes(self, dims: Dims, tokens: int) -> Bytes:
        """The sum of `memory_parts`."""
        return sum(self.memory_parts(dims, tokens).values(), Bytes(0, 0))

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        """Keys and values that a step gathers, rebuilds or decodes for one layer, in a batch of one.

        Device memory beside what is held; one layer at a time needs it.
        """
        return 0

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        """Device memory that one decoded token has to read, over all layers, in a batch of one.

        Each byte once for every list of tokens that asks for it, whatever an implementation copies in between.
        """
        return self.prompt_bytes(dims, tokens).device

    def stages(self, dims: Dims, tokens: int) -> Stages | None:
        """`read_bytes` by what depends on what, where a step fetches from the host what it chose just before.

        None where nothing is fetched, or it is known earlier.
        """
        return None

    def step_flop(self, dims: Dims, tokens: int) -> int:
        """Floating-point operations of one decoded token's attention, over all layers, in a batch of one."""
        return round(4 * dims.layers * dims.q_heads * dims.head_dim * self.attended_tokens(dims, tokens))

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        """Tokens that a decode step attends to after a prompt of `tokens` and `later` more, mean over layers and heads.

        The largest number, where it depends on the text.
        """
        return tokens + later

    def bus_bytes(self, dims: Dims, tokens: int) -> int:
        """Bytes that one decoded token moves between host and device, over all layers, in a batch of one."""
        return 0

    def with_budget(self, tokens: int) -> Method | None:
        """This method attending to `tokens` tokens in all, in every layer that chooses; None if it does not choose.

        Raises `SkvError` if its parameters leave no room for a choice among so few.
        """
        changed: Any = self
        return cast("Method", replace(changed, budget=tokens)) if "budget" in self.params() else None

    def with_kv_bytes(self, dims: Dims, tokens: int, kv_bytes: int) -> Method | None:
        """The most accurate setting that holds `kv_bytes` bytes at most on the device, of a prompt of `tokens`.

        None if what it holds is not for the user to choose. Raises `SkvError` if the least it can hold is more.
        """
        return None

    def lossless(self, dims: Dims, tokens: int) -> Method | None:
        """The setting that must equal full attention up to `tokens` held tokens, or None if there is none."""
        return None

    def on_calibration(self, name: str | None) -> Method:
        """This method on the calibration of that name, where it asks for the model's own (`skv calibrate`).

        None: there can be none, because weights are random.
        """
        return self

    def check(self, dims: Dims) -> None:
        """Raise `SkvError` if these parameters cannot work on a model of this geometry."""


def largest_within(
    make: Callable[[int], Method], low: int, high: int, dims: Dims, tokens: int, kv_bytes: int
) -> Method:
    """`make(n)` for the largest n from `low` to `high` with which a prompt of `tokens` takes `kv_bytes` at most.

    What is held on the device must grow with n. Raises `SkvError` if even `low` takes more.
    """

    def exceeds(n: int) -> bool:
        return make(n).prompt_bytes(dims, tokens).device > kv_bytes

    within = bisect_left(range(low, high + 1), True, key=exceeds) - 1
    if within < 0:
        least = make(low)
        held = least.prompt_bytes(dims, tokens).device
        raise SkvError(f"{least.label} holds {held / 2**20:.1f} MiB of {tokens} tokens, more than was given")
    return make(low + within)


def require_rotary(dims: Dims, method: str) -> None:
    """Raise `SkvError` for a model of which it is not known how positions turn its keys."""
    known = f"{method}: un-rotates keys, and skv does not know how this model turns them by their positions"
    require(dims.rotary, known)
