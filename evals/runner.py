"""The spine of an accuracy run: each prompt is computed once, then every method answers from it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from evals.results import Key, Record, RunFolder
from evals.task import Example, Task
from shadowkv.engine import Engine, Prefill
from shadowkv.errors import SkvError
from shadowkv.loading import LoadedModel
from shadowkv.method import Method
from shadowkv.prefills import SparsePrefill

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
    examples: Sequence[Example],
    methods: Sequence[Method],
    folder: RunFolder,
    on_step: Callable[[Step], None] = lambda _: None,
) -> None:
    """Answer every (example, method) pair that the folder does not hold yet."""
    total = len(examples) * len(methods)
    done = sum(folder.has(_key(example, method)) for example in examples for method in methods)
    on_step(Step(done, total, None))
    # In the order of their tokens, prompts walk through the tree of their common prefixes depth first. The engine
    # keeps one prompt, so every shared prefix is computed once: all depths of a haystack, and its shorter lengths.
    for example in sorted(examples, key=lambda example: example.input_ids):
        todo = [method for method in methods if not folder.has(_key(example, method))]
        if not todo:
            continue
        for prefill in dict.fromkeys(method.prefill for method in todo):
            alike = [method for method in todo if method.prefill == prefill]
            for record in _answers(engine, loaded, task, example, alike):
                folder.append(record)
                done += 1
                on_step(Step(done, total, record))


def _answers(
    engine: Engine, loaded: LoadedModel, task: Task, example: Example, methods: Sequence[Method]
) -> Iterable[Record]:
    """One record per method, from the one prefill they share; each is made when it is asked for."""
    blank = _blank(example)
    try:
        prefill, blank = _prefill(engine, example, methods[0].prefill, blank)
    except _FAILURES as failure:
        return [_failed(replace(blank, method=method.label), failure) for method in methods]
    return (_answer(engine, loaded, task, prefill, method, blank) for method in methods)


def _key(example: Example, method: Method) -> Key:
    return Key(example.benchmark, example.task, example.length_tokens, example.sample, method.label)


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


def _answer(engine: Engine, loaded: LoadedModel, task: Task, prefill: Prefill, method: Method, blank: Record) -> Record:
    blank = replace(blank, method=method.label)
    limit = int(blank.meta["max_new_tokens"])
    try:
        started = time.perf_counter()
        cache = engine.replay(prefill, method)
        built = _now(engine)
        held = cache.nbytes()
        resumed = time.perf_counter()
        tokens = engine.decode(cache, prefill.logits, limit, loaded.stop_ids)[0]
        ended = _now(engine)
        cache.close()
    except _FAILURES as failure:
        return _failed(blank, failure)
    prediction = str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))
    return replace(
        blank,
        score=task.score(prediction, blank.references),
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
