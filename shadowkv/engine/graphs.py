"""A decode step of the whole model as one CUDA graph: hundreds of launches for the price of one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowkv.anatomy.forward import last_logits
from shadowkv.anatomy.rope import Rope
from shadowkv.engine.cache import MethodCache
from shadowkv.tensors.streams import join_captured

Result = TypeVar("Result")


class Capture(Protocol):
    """How a sequence of operations becomes a graph."""

    def __call__(self, step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Returns (replay, what `step` returned).

        `step` is called once without anything being computed, and each call of `replay` then computes it, writing to
        what was returned.
        """


def can_be_graphed(rope: Rope, cache: MethodCache) -> bool:
    """Whether every layer has a step of fixed shapes, and the model's rotary embedding asks for no lengths."""
    return not rope.crossings and cache.steady


def capture_on_gpu(step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """Capture with torch's graph-private memory pool. What `step` raises is raised."""
    graph, failures = torch.cuda.CUDAGraph(), list[Exception]()

    def attempt() -> Result:
        try:
            return step()
        except Exception as failure:
            failures.append(failure)
            join_captured()
            raise

    try:
        with _nothing_collected(), torch.cuda.graph(graph):
            result = attempt()
    except Exception:
        # A capture that is broken off ends in an error of its own, which would hide that memory ran out.
        if failures:
            raise failures[0] from None
        raise
    return graph.replay, result


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Garbage goes before the block and not within: host memory in it is unregistered, which no capture survives."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Sequence(Generic[Result]):
    """Operations that are the same each time: run as they are, then captured, then replayed.

    The first run compiles kernels and makes tables. What a table holds stays with the graph that reads it.
    """

    def __init__(self, run: Callable[[], Result], rope: Rope, capture: Capture) -> None:
        self._run, self._rope, self._capture = run, rope, capture
        self._warm = False
        self._captured: tuple[Callable[[], None], Result, list[object]] | None = None

    def forget(self) -> None:
        """Begin anew: tensors moved."""
        self._warm, self._captured = False, None

    def __call__(self, capturable: bool) -> Result:
        if not self._warm or not capturable:
            self._warm = True
            return self._run()
        if self._captured is None:
            self._captured = (*self._capture(self._run), self._rope.tables)
        replay, result, _ = self._captured
        replay()
        return result


class GraphedStep:
    """Feeds [B,1] tokens to a cache and returns the logits after them, [B,vocab] fp32, valid until the next call.

    A step after which tensors lie elsewhere (the first, and those before which the cache grew) runs as it is. The one
    after it is captured, and all others are replays. What has to be put in order before some steps is a graph of its
    own. Where a growth leaves values in memory that the host has to read, all steps run as they are from then on.
    """

    def __init__(self, model: PreTrainedModel, rope: Rope, cache: MethodCache, capture: Capture) -> None:
        self._model, self._cache = model, cache
        self._ids = torch.zeros(len(cache.row_tokens), 1, dtype=torch.long, device=model.device)
        self._positions = torch.zeros_like(self._ids)
        self._next: list[int] = []  # what the device holds as positions: a step leaves them at the next one
        self._capturable = True
        self._step = _Sequence(self._forward, rope, capture)
        self._rearrange = _Sequence(cache.rearrange, rope, capture)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        cache = self._cache
        if not cache.usable():
            raise ValueError("this cache failed in a step, or its prompt was replaced by a later prefill")
        usable, cache.usable = cache.usable, lambda: False  # see `Engine.extend`
        if cache.make_room():
            self._step.forget()
            self._rearrange.forget()
            self._capturable = cache.steady  # not where the host could not pin what it made room for
        if cache.rearranges:
            self._rearrange(self._capturable)
        self._ids.copy_(tokens)
        if self._next != cache.row_tokens:
            self._positions.copy_(torch.tensor(cache.row_tokens)[:, None])
        logits = self._step(self._capturable)
        cache.usable = usable
        cache.fed(1)
        self._next = list(cache.row_tokens)
        cache.recount()
        return logits

    def _forward(self) -> Tensor:
        with self._cache.with_room():
            logits = last_logits(self._model, self._ids, self._cache, position_ids=self._positions)
        self._positions += 1
        return logits
