"""The spine of an accuracy run: each prompt is computed once, then every method answers from it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from evals.diagnostics import diagnose
from evals.results import Key, Record, RunFolder
from evals.task import Example, Question, Task
from shadowkv.engine import Engine, Prefill
from shadowkv.errors import SkvError
from shadowkv.loading import LoadedModel
from shadowkv.method import Method

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
    *,
    diagnostics: bool = False,
) -> None:
    """Answer every (question, method) pair that the folder does not hold yet.

    With `diagnostics`, prompts of one turn also get each layer of each method compared with full attention.
    """
    missing = {q: [m for m in methods if not folder.has(_key(task.benchmark, q, m))] for q in questions}
    todo = [question for question in questions if missing[question]]
    total = len(questions) * len(methods)
    done = total - sum(map(len, missing.values()))
    on_step(Step(done, total, None))
    for example in one_ahead(task.examples(loaded.tokenizer, todo)):
        asked = {method for question in example.questions for method in missing.get(question, ())}
        open_methods = [method for method in methods if method in asked]
        for prefill in dict.fromkeys(method.prefill for method in open_methods):
            alike = [method for method in open_methods if method.prefill == prefill]
            for record in _answers(engine, loaded, task, example, alike, diagnostics):
                if not folder.has(record.key):  # of several turns, some may have been answered before
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
    engine: Engine, loaded: LoadedModel, task: Task, example: Example, methods: Sequence[Method], diagnostics: bool
) -> Iterable[Record]:
    """One record per method and turn, from the one prefill they share; each is made when it is asked for."""
    started = time.perf_counter()
    try:
        prefill = engine.prefill(torch.tensor([example.input_ids]), methods[0].prefill)
    except _FAILURES as failure:
        unasked = [_blank(turn, method) for method in methods for turn in example.turns if turn.references]
        return [_failed(blank, failure) for blank in unasked]
    seconds = _now(engine) - started
    return chain.from_iterable(
        _conversation(engine, loaded, task, example, prefill, seconds, method, diagnostics) for method in methods
    )


def _key(benchmark: str, question: Question, method: Method) -> Key:
    return Key(benchmark, *question, method.label)


def _blank(turn: Example, method: Method) -> Record:
    """What is known of a record before anything runs."""
    return Record(
        benchmark=turn.benchmark,
        task=turn.task,
        length=turn.length_tokens,
        sample=turn.sample,
        method=method.label,
        score=None,
        status="error",
        error=None,
        prediction="",
        references=list(turn.references),
        prompt_tokens=len(turn.input_ids),
        reused_tokens=0,
        new_tokens=0,
        tokens=[],
        stopped=False,
        prefill_s=0.0,
        build_s=0.0,
        decode_s=0.0,
        device_bytes=0,
        host_bytes=0,
        prompt_sha256=hashlib.sha256(np.asarray(turn.input_ids, dtype="<i8").tobytes()).hexdigest(),
        meta={**turn.meta, "max_new_tokens": turn.max_new_tokens},
    )


def _conversation(
    engine: Engine,
    loaded: LoadedModel,
    task: Task,
    example: Example,
    prefill: Prefill,
    prefill_s: float,
    method: Method,
    diagnostics: bool,
) -> Iterator[Record]:
    """Every turn of an example in one cache of `method`. Where a turn fails, those after it have failed as well."""
    turns = iter(example.turns)
    asked = [turn for turn in example.turns if turn.references]
    blanks = {turn.sample: _blank(turn, method) for turn in asked}
    try:
        started = time.perf_counter()
        cache = engine.replay(prefill, method)
        build_s = _now(engine) - started
        logits, unfed = prefill.logits, list[int]()
        for turn in turns:
            began = time.perf_counter()
            if turn is not example:
                logits = engine.extend(cache, torch.tensor([[*unfed, *turn.input_ids]]))
                build_s = _now(engine) - began
            if not turn.references:
                continue
            held, tokens_held = cache.nbytes(), cache.get_seq_length()
            stop_ids = loaded.stop_ids.union(turn.stop_ids)
            resumed = time.perf_counter()
            tokens = engine.decode(cache, logits, turn.max_new_tokens, stop_ids, turn.min_new_tokens)[0]
            decode_s = _now(engine) - resumed
            unfed = tokens[-1:] if len(tokens) == turn.max_new_tokens else []
            prediction = str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))
            compared = diagnostics and not example.later
            found = asdict(diagnose(engine, prefill, method, turn.max_new_tokens, stop_ids)) if compared else None
            blank = blanks.pop(turn.sample)
            yield replace(
                blank,
                meta={**blank.meta, "diagnostics": found} if found else blank.meta,
                score=task.score(turn, prediction),
                status="ok",
                prediction=prediction,
                prompt_tokens=tokens_held,
                reused_tokens=prefill.reused_tokens,
                new_tokens=len(tokens),
                tokens=tokens,
                stopped=len(tokens) < turn.max_new_tokens,
                prefill_s=prefill_s,
                build_s=build_s,
                decode_s=decode_s,
                device_bytes=held.device,
                host_bytes=held.host,
                attended_tokens=method.attended_tokens(
                    engine.dims, prefill.prompt_tokens, tokens_held - prefill.prompt_tokens
                ),
                bus_bytes=method.bus_bytes(engine.dims, tokens_held),
            )
        cache.close()
    except _FAILURES as failure:
        yield from (_failed(blank, failure) for blank in blanks.values())


def _failed(blank: Record, failure: BaseException) -> Record:
    text = " ".join(str(failure).split())[:300] or type(failure).__name__
    out_of_memory = isinstance(failure, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text
    return replace(blank, status="oom" if out_of_memory else "error", error=text)


def _now(engine: Engine) -> float:
    """The time after everything queued on the device is done."""
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize(engine.model.device)
    return time.perf_counter()
