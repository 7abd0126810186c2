"""What is measured: methods of our engine, and full attention as other engines run it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from evals.bench.prompts import Prompts
from evals.bench.timing import Clock
from shadowkv.anatomy.attention import NAME
from shadowkv.anatomy.forward import last_logits
from shadowkv.common.dims import Bytes
from shadowkv.common.ranges import ranged
from shadowkv.contract.method import Method
from shadowkv.engine.cache import MethodCache
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full
from shadowkv.tensors.pinned import HostRows


@dataclass(frozen=True)
class Began:
    """What it took until a batch could decode."""

    ttft_s: float | None
    prefill_s: float | None
    build_s: float | None
    stacked: bool | None
    streamed_rows: int = 0  # computed as their caches were built, which then counts as prefill


@ranged("sampling")
def _greedy(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1, keepdim=True)


class Decoding(ABC):
    """A batch that decodes greedily, one token of every row per step."""

    began: Began

    def __init__(self, first_tokens: Tensor) -> None:
        self._tokens = [first_tokens]

    @abstractmethod
    def _logits(self, tokens: Tensor) -> Tensor:
        """Feed [B,1] and return the logits after it, [B,vocab]."""

    @abstractmethod
    def nbytes(self) -> Bytes:
        """Keys and values held."""

    def resident_chunks(self) -> Sequence[Tensor]:
        """See `shadowkv.contract.method.DecodeCache.resident_chunks`."""
        return ()

    def chunk_numbers(self) -> Sequence[Tensor]:
        """See `shadowkv.contract.method.DecodeCache.chunk_numbers`."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Steps are taken within: between them other batches may use the model."""
        yield

    def step(self) -> None:
        """Decode one token of every row."""
        self._tokens.append(_greedy(self._logits(self._tokens[-1])))

    def tokens_sha256(self) -> str:
        """Checksum of the tokens so far, row by row."""
        ids = torch.cat(self._tokens, dim=1).cpu().numpy().astype("<i8")
        return hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()


class Contender(ABC):
    """A method in an engine."""

    label: str
    method: Method  # what it keeps and reads, for planning
    stays: ClassVar[bool] = True  # whether a batch can wait while others are built and decode

    def leave_host(self, needed_bytes: int) -> None:  # noqa: B027 - most keep nothing
        """See `Prompts.leave_host`."""

    @abstractmethod
    def start(self, context: int, batch: int) -> Decoding:
        """Bring `batch` prompts to their first token."""


class SkvContender(Contender):
    """A method in our engine: prompts one after the other, or few at a time, then joined into one batch."""

    def __init__(self, engine: Engine, prompts: Prompts, method: Method) -> None:
        self.label, self.method = method.label, method
        self._engine, self._prompts = engine, prompts
        self._clock = Clock(engine.model.device)

    def leave_host(self, needed_bytes: int) -> None:
        self._prompts.leave_host(needed_bytes)

    def start(self, context: int, batch: int) -> Decoding:
        engine, sparse = self._engine, self.method.prefill
        self._prompts.prepare(context, batch, sparse)
        caches, first, host_rows = list[MethodCache](), list[int](), HostRows(batch)
        # Until each prompt's first token, without its cache and with it.
        alone_s, built_s = list[float](), list[float]()
        prefill_s, build_s = 0.0, 0.0
        for rows in self._prompts.rows(context, batch, sparse):
            began = self._clock.now()
            caches.append(engine.adopt(rows, self.method, host_rows))
            tokens, took = rows.first_tokens(), self._clock.now() - began
            first += tokens
            if rows.streamed:
                prefill_s += took
                built_s += [took] * len(tokens)
                continue
            build_s += took
            if rows.prefill_s is not None:
                prefill_s += rows.prefill_s
                alone_s.append(rows.prefill_s)
        began = self._clock.now()
        cache = engine.join(caches, self.method)
        build_s += self._clock.now() - began
        fed = torch.tensor(first, device=engine.model.device)[:, None]
        whole = cache.stacked or batch == 1
        if not alone_s + built_s:
            return _SkvDecoding(engine, cache, fed, Began(None, None, build_s, whole))
        ttft_s = float(np.median(alone_s or built_s))
        return _SkvDecoding(engine, cache, fed, Began(ttft_s, prefill_s, build_s, whole, len(built_s)))


class _SkvDecoding(Decoding):
    def __init__(self, engine: Engine, cache: MethodCache, tokens: Tensor, began: Began) -> None:
        super().__init__(tokens)
        self.began, self._cache = began, cache
        self._feed = engine.stepper(cache)

    def _logits(self, tokens: Tensor) -> Tensor:
        return self._feed(tokens)

    def nbytes(self) -> Bytes:
        return self._cache.nbytes()

    def resident_chunks(self) -> Sequence[Tensor]:
        return self._cache.resident_chunks()

    def chunk_numbers(self) -> Sequence[Tensor]:
        return self._cache.chunk_numbers()

    def close(self) -> None:
        self._cache.close()


class TransformersContender(Contender):
    """Full attention as plain transformers runs it: sdpa, `DynamicCache`, the whole batch prefilled together.

    The prompt goes through in the chunks of our engine (`prefill_chunk_size` of generate), or its activations would
    not fit where ours do.
    """

    label = "full@hf"
    method = Full()

    def __init__(self, engine: Engine, prompts: Prompts) -> None:
        self._engine, self._prompts = engine, prompts
        self._clock = Clock(engine.model.device)

    def leave_host(self, needed_bytes: int) -> None:
        self._prompts.leave_host(needed_bytes)

    @torch.inference_mode()
    def start(self, context: int, batch: int) -> Decoding:
        model = self._engine.model
        if self._prompts.made_up:
            return self._filled(context, batch)
        ids = torch.cat([self._prompts.ids(context, number) for number in range(batch)]).to(model.device)
        decoding = _TransformersDecoding(model)
        try:
            began = self._clock.now()
            for chunk in ids.split(self._engine.prefill_chunk_tokens, dim=1):
                first = decoding.feed(chunk)
            decoding.begin(first.argmax(dim=-1, keepdim=True))
            seconds = self._clock.now() - began
        except BaseException:
            decoding.close()
            raise
        decoding.rest()
        decoding.began = Began(seconds, seconds, None, True)
        return decoding

    def _filled(self, context: int, batch: int) -> Decoding:
        """A cache of made-up keys and values, layer by layer."""
        rows = list(self._prompts.rows(context, batch, None))
        decoding = _TransformersDecoding(self._engine.model)
        for layer in range(len(rows[0].recorded)):
            made = [row.recorded[layer].layer_kv(None, 0) for row in rows]
            decoding.fill(layer, torch.cat([kv.k for kv in made]), torch.cat([kv.v for kv in made]))
        first = [token for row in rows for token in row.first_tokens()]
        decoding.begin(torch.tensor(first, device=self._engine.model.device)[:, None])
        decoding.rest()
        decoding.began = Began(None, None, None, True)
        return decoding


class _TransformersDecoding(Decoding):
    def __init__(self, model: Any) -> None:
        super().__init__(torch.empty(0))
        self._model = model
        self._cache = DynamicCache(config=model.config)
        model.set_attn_implementation("sdpa")

    def begin(self, tokens: Tensor) -> None:
        self._tokens = [tokens]

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._cache.update(k, v, layer)

    def feed(self, ids: Tensor) -> Tensor:
        return last_logits(self._model, ids, self._cache)

    @torch.inference_mode()
    def _logits(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens)

    def nbytes(self) -> Bytes:
        held = [x for layer in self._cache.layers for x in (layer.keys, layer.values)]
        return Bytes(sum(x.numel() * x.element_size() for x in held), 0)

    @contextmanager
    def awake(self) -> Iterator[None]:
        self._model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.rest()

    def rest(self) -> None:
        """Give the model back what our engine attached."""
        self._model.set_attn_implementation(NAME)

    def close(self) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self.rest()


ENGINES: dict[str, Callable[[Engine, Prompts], Contender]] = {"hf": TransformersContender}
