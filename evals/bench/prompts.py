"""What fills the rows of a batch: real prompts, each computed once and kept on the host, or made-up keys and values.

Either way a method gets its layers one at a time on the model's device, so a batch never needs as many dense
prefills there, and a prompt that is kept needs none while caches are built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from evals.bench.timing import Clock
from evals.niah.prompt import Haystacks
from evals.seeding import seeded
from shadowkv.engine import Engine
from shadowkv.errors import SkvError
from shadowkv.geometry import sliding_windows
from shadowkv.host_memory import available_host_bytes
from shadowkv.method import OBSERVED_QUERIES, LayerKV
from shadowkv.prefills import SparsePrefill
from shadowkv.recording import RecordedLayer

_KEPT_SHARE = 0.25  # of the free host memory, for prompts that the next measurement needs again
_SCALE_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One prompt, layer by layer, and its first new token."""

    recorded: Sequence[RecordedLayer]
    first_token: int
    prefill_s: float | None  # None where nothing was computed


class Prompts(ABC):
    """Rows by context and number; a row is the same in every batch, and distinct from the others."""

    made_up: ClassVar[bool] = False  # whether keys and values are not those of the token ids

    @abstractmethod
    def row(self, context: int, number: int, sparse: SparsePrefill | None) -> Row:
        """The row's layers; after the last use of them `engine.forget()` frees what is not kept."""

    @abstractmethod
    def ids(self, context: int, number: int) -> Tensor:
        """Token ids [1,context]."""

    def prepare(self, context: int, batch: int, sparse: SparsePrefill | None) -> None:  # noqa: B027 - may be nothing
        """Compute what can be kept of the first `batch` rows, before any cache takes its place on the device."""


@dataclass(frozen=True)
class _KeptLayer:
    """A layer of a prefill on the host, brought back to the device when it is asked for."""

    window: int | None
    tokens: int
    kv: LayerKV
    device: torch.device

    def layer_kv(self, row: int | None, skip_tokens: int) -> LayerKV:
        return _moved(self.kv, self.device)


class RealPrompts(Prompts):
    """Text cut to exactly the context, another stretch of it for every row."""

    def __init__(self, engine: Engine, tokenizer: Any, text: str, seed: int) -> None:
        self._engine = engine
        self._clock = Clock(engine.model.device)
        self._haystacks = Haystacks(tokenizer, text, seed)
        self._kept: dict[tuple[int, int, SparsePrefill | None], Row] = {}

    def ids(self, context: int, number: int) -> Tensor:
        return torch.tensor([self._haystacks.ids(number, context)])

    def row(self, context: int, number: int, sparse: SparsePrefill | None) -> Row:
        if (context, number, sparse) in self._kept:
            return self._kept[context, number, sparse]
        self._kept = {key: row for key, row in self._kept.items() if key[0] == context}
        engine, ids = self._engine, self.ids(context, number)
        engine.forget()  # its buffers may be those of a row that is kept
        started = self._clock.now()
        prefill = engine.prefill(ids, sparse)
        first = int(prefill.logits.argmax())
        row = Row(prefill.recording.recorded, first, self._clock.now() - started)
        engine.forget()
        taken = sum(layer.nbytes() for layer in prefill.recording.recorded)
        held = taken * len(self._kept)  # those of other contexts are gone
        if held + taken <= _KEPT_SHARE * (available_host_bytes() + held):
            row = Row(self._on_host(row.recorded), first, row.prefill_s)
            self._kept[context, number, sparse] = row
        return row

    def prepare(self, context: int, batch: int, sparse: SparsePrefill | None) -> None:
        for number in range(batch):
            self.row(context, number, sparse)
            if (context, number, sparse) not in self._kept:
                return

    def _on_host(self, recorded: Sequence[RecordedLayer]) -> list[RecordedLayer]:
        device, host = self._engine.model.device, torch.device("cpu")
        return [_KeptLayer(x.window, x.tokens, _moved(x.layer_kv(None, 0), host), device) for x in recorded]


@dataclass(frozen=True)
class _MadeUpLayer:
    """Normally distributed keys, values and queries, the same whenever they are asked for."""

    window: int | None
    tokens: int
    like: LayerKV  # of a short prompt: shapes, dtype, device and scale
    seed: int
    with_queries: bool

    def layer_kv(self, row: int | None, skip_tokens: int) -> LayerKV:
        k, q = self.like.k, self.like.q_tail
        generator = torch.Generator(k.device).manual_seed(self.seed)

        def made(like: Tensor, tokens: int) -> Tensor:
            shape = (*like.shape[:2], tokens, like.shape[3])
            noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
            return noise.mul_(float(like.float().std()))

        return LayerKV(
            made(k, self.tokens),
            made(self.like.v, self.tokens),
            made(q, min(OBSERVED_QUERIES, self.tokens)),
            self.like.scaling,
            made(q, self.tokens) if self.with_queries else None,
        )


class SyntheticPrompts(Prompts):
    """Keys, values and queries of the model's shapes and of the size they have in a prompt of 64 random tokens."""

    made_up = True

    def __init__(self, engine: Engine, seed: int, *, with_queries: bool) -> None:
        self._engine, self._seed, self._with_queries = engine, seed, with_queries
        self._windows = sliding_windows(engine.model.config)
        self._vocabulary = int(engine.model.get_input_embeddings().weight.shape[0])

    @lru_cache(maxsize=1)  # noqa: B019 - one such object lives as long as its engine
    def _scales(self) -> list[LayerKV]:
        prefill = self._engine.prefill(self._random_ids(_SCALE_TOKENS, 0))
        self._engine.forget()
        return [layer.layer_kv(None, 0) for layer in prefill.recording.recorded]

    def ids(self, context: int, number: int) -> Tensor:
        return self._random_ids(context, number)

    def row(self, context: int, number: int, sparse: SparsePrefill | None) -> Row:
        if sparse is not None:
            raise SkvError(f"{sparse.name} is a way to compute a prompt, and made-up keys and values need none")
        layers = [
            _MadeUpLayer(
                window,
                context,
                like,
                seeded("synthetic kv", self._seed, number, place).getrandbits(48),
                self._with_queries,
            )
            for place, (window, like) in enumerate(zip(self._windows, self._scales(), strict=True))
        ]
        return Row(layers, int(self._random_ids(1, number)), None)

    def _random_ids(self, tokens: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seeded("synthetic ids", self._seed, number, tokens).getrandbits(48))
        return torch.randint(self._vocabulary, (1, tokens), generator=generator)


def warm_up(engine: Engine) -> None:
    """A short prompt through the model, so that the first one measured does not pay for what happens once."""
    engine.prefill(torch.zeros(1, _SCALE_TOKENS, dtype=torch.long))
    engine.forget()


def _moved(kv: LayerKV, device: torch.device) -> LayerKV:
    everything = kv.q_all if kv.q_all is None else kv.q_all.to(device)
    return kv._replace(k=kv.k.to(device), v=kv.v.to(device), q_tail=kv.q_tail.to(device), q_all=everything)
