"""The spine of an accuracy run: each prompt is computed once, then every method answers from it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from evals.results import Key, Record, RunFolder
from evals.task import Example, Question, Task
from shadowkv.engine import Engine, Prefill
from shadowkv.errors import SkvError
from shadowkv.loading import LoadedModel
from shadowkv.method import Method
from shadowkv.prefills import SparsePrefill

T = TypeVar("T")
# What a single answer may fail with without taking the run down; anything else is a bug and ends it.
_FAILURES = (RuntimeError, MemoryError, SkvError)


class Step(NamedTuple):
    """Progress: answers finished of all, and the one just made."""

    done: int
    total: int
    record: Record | None


def run_accuracy(
    engine: Engine,
    loaded: LoadedModel,
    task: Task,
    questions: Sequence[Question],
    methods: Sequence[Method],
    folder: RunFolder,
    on_step: Callable[[Step], None] = lambda _: None,
) -> None:
    """Answer every (question, method) pair that the folder does not hold yet."""
    missing = {q: [m for m in methods if not folder.has(_key(task.benchmark, q, m))] for q in questions}
    todo = [question for question in questions if missing[question]]
    total = len(questions) * len(methods)
    done = total - sum(map(len, missing.values()))
    on_step(Step(done, total, None))
    for example in one_ahead(task.examples(loaded.tokenizer, todo)):
        open_methods = missing[example.question]
        for prefill in dict.fromkeys(method.prefill for method in open_methods):
            alike = [method for method in open_methods if method.prefill == prefill]
            for record in _answers(engine, loaded, task, example, alike):
                folder.append(record)
                done += 1
                on_step(Step(done, total, record))


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; each is made, in a thread, while the one before it is in use."""
    with ThreadPoolExecutor(max_workers=1) as maker:
        coming = maker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = maker.submit(next, items, None)
            yield item


def _answers(
    engine: Engine, loaded: LoadedModel, task: Task, example: Example, methods: Sequence[Method]
) -> Iterable[Record]:
    """One record per method, from the one prefill they share; each is made when it is asked for."""
    blank = _blank(example)
    try:
        prefill, blank = _prefill(engine, example, methods[0].prefill, blank)
    except _FAILURES as failure:
        return [_failed(replace(blank, method=method.label), failure) for method in methods]
    return (_answer(engine, loaded, task, example, prefill, method, blank) for method in methods)


def _key(benchmark: str, question: Question, method: Method) -> Key:
    return Key(benchmark, *question, method.label)


def _blank(example: Example) -> Record:
    """What is known of a record before anything runs."""
    return Record(
        benchmark=example.benchmark,
        task=example.task,
        length=example.length_tokens,
        sample=example.sample,
        method="",
        score=None,
        status="error",
        error=None,
        prediction="",
        references=list(example.references),
        prompt_tokens=len(example.input_ids),
        reused_tokens=0,
        new_tokens=0,
        tokens=[],
        stopped=False,
        prefill_s=0.0,
        build_s=0.0,
        decode_s=0.0,
        device_bytes=0,
        host_bytes=0,
        prompt_sha256=hashlib.sha256(np.asarray(example.input_ids, dtype="<i8").tobytes()).hexdigest(),
        meta={**example.meta, "max_new_tokens": example.max_new_tokens},
    )


def _prefill(engine: Engine, example: Example, sparse: SparsePrefill | None, blank: Record) -> tuple[Prefill, Record]:
    started = time.perf_counter()
    prefill = engine.prefill(torch.tensor([example.input_ids]), sparse)
    seconds = _now(engine) - started
    return prefill, replace(blank, prefill_s=seconds, reused_tokens=prefill.reused_tokens)


def _answer(
    engine: Engine,
    loaded: LoadedModel,
    task: Task,
    example: Example,
    prefill: Prefill,
    method: Method,
    blank: Record,
) -> Record:
    blank = replace(
        blank,
        method=method.label,
        attended_tokens=method.attended_tokens(engine.dims, prefill.prompt_tokens),
        bus_bytes=method.bus_bytes(engine.dims, prefill.prompt_tokens),
    )
    limit, stop_ids = example.max_new_tokens, loaded.stop_ids.union(example.stop_ids)
    try:
        started = time.perf_counter()
        cache = engine.replay(prefill, method)
        built = _now(engine)
        held = cache.nbytes()
        resumed = time.perf_counter()
        tokens = engine.decode(cache, prefill.logits, limit, stop_ids, example.min_new_tokens)[0]
        ended = _now(engine)
        cache.close()
    except _FAILURES as failure:
        return _failed(blank, failure)
    prediction = str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))
    return replace(
        blank,
        score=task.score(example, prediction),
        status="ok",
        prediction=prediction,
        new_tokens=len(tokens),
        tokens=tokens,
        stopped=len(tokens) < limit,
        build_s=built - started,
        decode_s=ended - resumed,
        device_bytes=held.device,
        host_bytes=held.host,
    )


def _failed(blank: Record, failure: BaseException) -> Record:
    text = " ".join(str(failure).split())[:300] or type(failure).__name__
    out_of_memory = isinstance(failure, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text
    return replace(blank, status="oom" if out_of_memory else "error", error=text)


def _now(engine: Engine) -> float:
    """The time after everything queued on the device is done."""
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize(engine.model.device)
    return time.perf_counter()
