"""What fills the rows of a batch: real prompts, or made-up keys and values.

Either way a method gets its layers one at a time on the model's device, where no dense prefill ever stands: a prompt is
computed layer by layer (`shadowkv.engine.streamed`), to the host if it is kept there for later measurements, else
straight into a cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from evals.bench.timing import Clock
from evals.common.seeding import seeded
from evals.niah.prompt import Haystacks
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import OBSERVED_QUERIES, LayerKV
from shadowkv.contract.sparse_prefill import SparsePrefill
from shadowkv.engine.engine import Engine
from shadowkv.engine.recording import RecordedLayer
from shadowkv.engine.streamed import StreamedPrompt
from shadowkv.tensors.host_memory import available_host_bytes

_KEPT_SHARE = 0.25  # of the free host memory, for prompts that the next measurement needs again
_SCALE_TOKENS = 64


@dataclass(frozen=True)
class Rows:
    """One prompt, or several of one length, layer by layer."""

    recorded: Sequence[RecordedLayer]
    first_tokens: Callable[[], list[int]]  # new token of each, known once the last layer was asked for
    prefill_s: float | None = None  # of one; None where nothing was computed, or is yet to be
    streamed: bool = False  # whether they are computed as their layers are asked for


class Prompts(ABC):
    """Rows by context and number; a row is the same in every batch, and distinct from the others."""

    made_up: ClassVar[bool] = False  # whether keys and values are not those of the token ids

    @abstractmethod
    def rows(self, context: int, batch: int, sparse: SparsePrefill | None) -> Iterator[Rows]:
        """The first `batch` rows in order. Their layers are to be used before the next rows are asked for."""

    @abstractmethod
    def ids(self, context: int, number: int) -> Tensor:
        """Token ids [1,context]."""

    def leave_host(self, needed_bytes: int) -> None:  # noqa: B027 - may be nothing
        """Keep out of the way of a measurement that needs so much of the host's memory."""

    def prepare(self, context: int, batch: int, sparse: SparsePrefill | None) -> None:  # noqa: B027 - may be nothing
        """Compute what can be kept of the first `batch` rows, before any cache takes its place on the device."""


@dataclass(frozen=True)
class _KeptLayer:
    """A layer of a prefill on the host, brought back to the device when it is asked for."""

    window: int | None
    served: bool
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
        self._kept: dict[tuple[int, int, SparsePrefill | None], Rows] = {}
        self._left_bytes = 0  # of the host's memory, to what is measured

    def ids(self, context: int, number: int) -> Tensor:
        return torch.tensor([self._haystacks.ids(number, context)])

    def rows(self, context: int, batch: int, sparse: SparsePrefill | None) -> Iterator[Rows]:
        # As many at once as fill a chunk of the prefill.
        together = max(1, self._engine.prefill_chunk_tokens // context)
        number = 0
        while number < batch:
            kept = self._keep(context, number, sparse)
            end = number + 1 if kept else min(number + together, batch)
            yield kept or self._streamed(context, range(number, end), sparse)
            number = end

    def leave_host(self, needed_bytes: int) -> None:
        self._left_bytes = needed_bytes
        while self._kept and self._kept_bytes > self._keepable_bytes:
            self._kept.popitem()

    def prepare(self, context: int, batch: int, sparse: SparsePrefill | None) -> None:
        for number in range(batch):
            if self._keep(context, number, sparse) is None:
                return

    def _streamed(self, context: int, numbers: Sequence[int], sparse: SparsePrefill | None) -> Rows:
        prompt = self._engine.stream(torch.cat([self.ids(context, number) for number in numbers]), sparse)
        return Rows(prompt.recorded, partial(_greedy, prompt), streamed=True)

    def _keep(self, context: int, number: int, sparse: SparsePrefill | None) -> Rows | None:
        """A row on the host; None where there is no room for it."""
        if (context, number, sparse) in self._kept:
            return self._kept[context, number, sparse]
        self._kept = {key: rows for key, rows in self._kept.items() if key[0] == context}
        if self._kept_bytes + self._engine.snapshot_bytes(context) > self._keepable_bytes:
            return None
        prompt = self._engine.stream(self.ids(context, number), sparse)
        layers, prefill_s, device = list[RecordedLayer](), 0.0, self._engine.model.device
        for layer in prompt.recorded:
            began = self._clock.now()
            kv = layer.layer_kv(None, 0)
            prefill_s += self._clock.now() - began  # without the way to the host
            layers.append(_KeptLayer(layer.window, layer.served, layer.tokens, _moved(kv, torch.device("cpu")), device))
            del kv  # or it would be held while the next one is computed
        rows = Rows(layers, partial(list, _greedy(prompt)), prefill_s)
        self._kept[context, number, sparse] = rows
        return rows

    @property
    def _kept_bytes(self) -> int:
        return sum(self._engine.snapshot_bytes(context) for context, _, _ in self._kept)

    @property
    def _keepable_bytes(self) -> float:
        """What prompts may take, those kept included."""
        return _KEPT_SHARE * (available_host_bytes() + self._kept_bytes - self._left_bytes)


def _greedy(prompt: StreamedPrompt) -> list[int]:
    tokens: list[int] = prompt.logits.argmax(dim=-1).tolist()
    return tokens


@dataclass(frozen=True)
class _MadeUpLayer:
    """Normally distributed keys, values and queries, the same whenever they are asked for."""

    window: int | None
    served: bool
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
            made_up=True,
        )


class SyntheticPrompts(Prompts):
    """Keys, values and queries of the model's shapes and of the size they have in a prompt of 64 random tokens."""

    made_up = True

    def __init__(self, engine: Engine, seed: int, *, with_queries: bool) -> None:
        self._engine, self._seed, self._with_queries = engine, seed, with_queries
        self._vocabulary = int(engine.model.get_input_embeddings().weight.shape[0])

    @lru_cache(maxsize=1)  # noqa: B019 - one such object lives as long as its engine
    def _scales(self) -> list[LayerKV]:
        prefill = self._engine.prefill(self._random_ids(_SCALE_TOKENS, 0))
        self._engine.forget()
        return [layer.layer_kv(None, 0) for layer in prefill.recording.recorded]

    def ids(self, context: int, number: int) -> Tensor:
        return self._random_ids(context, number)

    def rows(self, context: int, batch: int, sparse: SparsePrefill | None) -> Iterator[Rows]:
        if sparse is not None:
            raise SkvError(f"{sparse.name} is a way to compute a prompt, and made-up keys and values need none")
        for number in range(batch):
            layers = [
                _MadeUpLayer(
                    layer.window,
                    layer.served,
                    context,
                    like,
                    seeded("synthetic kv", self._seed, number, place).getrandbits(48),
                    self._with_queries,
                )
                for place, (layer, like) in enumerate(zip(self._engine.layers, self._scales(), strict=True))
            ]
            yield Rows(layers, partial(list, [int(self._random_ids(1, number))]))

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
