"""The spine of an accuracy run: each prompt is computed once, then every method answers from it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from evals.common.asking.thoughts import read_answer
from evals.common.grouping import grouped
from evals.runs.diagnostics import diagnose
from evals.runs.failures import FAILURES, located, status_of
from evals.runs.forced.loop import forced_answers
from evals.runs.forced.record import ForcedRecord
from evals.runs.results import Key, Record
from evals.runs.run import Run
from evals.runs.task import Example, Question
from shadowkv.common.wording import one_line
from shadowkv.contract.method import Method
from shadowkv.engine.cache import MethodCache
from shadowkv.engine.snapshots import Prefill

T = TypeVar("T")
Answered = Record | ForcedRecord
_TAIL_TOKENS = 64  # kept of a prompt: enough for a question, too few to republish a data set's text


class Answers(Protocol):
    """Where answers go: a run folder, or what stands for one."""

    def has(self, key: Key) -> bool:
        """Whether this question is answered."""

    def append(self, record: Answered) -> None:
        """Take one more."""


class Step(NamedTuple):
    """Progress: answers finished of all, and the one just made."""

    done: int
    total: int
    record: Answered | None


def run_accuracy(
    run: Run,
    questions: Sequence[Question],
    methods: Sequence[Method],
    folder: Answers,
    on_step: Callable[[Step], None] = lambda _: None,
) -> None:
    """Answer every (question, method) pair that the folder does not hold yet."""
    missing = {q: [m for m in methods if not folder.has(key_of(run.task.benchmark, q, m))] for q in questions}
    todo = [question for question in questions if missing[question]]
    total = len(questions) * len(methods)
    done = total - sum(map(len, missing.values()))
    on_step(Step(done, total, None))
    for example in one_ahead(run.task.examples(run.loaded.tokenizer, todo)):
        open_ones = [
            _Open(method, attempt)
            for method in methods
            for attempt in example.attempts
            if any(method in missing.get(question, ()) for question in attempt.questions)
        ]
        for record in _records(run, example, open_ones):
            if not folder.has(record.key):  # of several turns, some may have been answered before
                folder.append(record)
                done += 1
                on_step(Step(done, total, record))


def _records(run: Run, example: Example, open_ones: Sequence[_Open]) -> Iterator[Answered]:
    if run.task.forced is not None:
        yield from forced_answers(run, run.task.forced, example, [one.method for one in open_ones])
        return
    for alike in grouped(open_ones, lambda one: one.method.prefill).values():
        yield from _answers(run, example, alike)


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; each is made, in a thread, while the one before it is in use."""
    with ThreadPoolExecutor(max_workers=1) as maker:
        coming = maker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = maker.submit(next, items, None)
            yield item


class _Open(NamedTuple):
    """An answer to be given: by whom, to what."""

    method: Method
    attempt: Example


class _Begun(NamedTuple):
    """A cache of the prompt."""

    cache: MethodCache
    logits: Tensor
    prefill_s: float
    prefilled: float  # when: building the cache counts from then on
    prefill: Prefill | None  # None where no other method answers from it


def _answers(run: Run, example: Example, open_ones: Sequence[_Open]) -> Iterator[Record]:
    """One record per method, answer and turn, from the one prefill they share; each is made when it is asked for."""
    if run.streamed:
        for method, attempt in open_ones:
            yield from _conversation(run, attempt, method, partial(_stream, run, example))
        return
    started = time.perf_counter()
    try:
        prefill = run.engine.prefill(torch.tensor([example.input_ids]), open_ones[0].method.prefill)
    except FAILURES as failure:
        yield from (
            _failed(blank, failure)
            for method, attempt in open_ones
            for blank in _blanks(run.loaded.tokenizer, attempt, method).values()
        )
        return
    seconds = run.now() - started
    for method, attempt in open_ones:
        yield from _conversation(run, attempt, method, partial(_replay, run, prefill, seconds))


def _replay(run: Run, prefill: Prefill, prefill_s: float, method: Method) -> _Begun:
    began = time.perf_counter()
    return _Begun(run.engine.replay(prefill, method), prefill.logits, prefill_s, began, prefill)


def _stream(run: Run, example: Example, method: Method) -> _Begun:
    began = time.perf_counter()
    prompt = run.engine.stream(torch.tensor([example.input_ids]), method.prefill)
    cache, ended = run.engine.adopt(prompt, method), run.now()
    return _Begun(cache, prompt.logits, ended - began, ended, None)


def key_of(benchmark: str, question: Question, method: Method) -> Key:
    """What the record of this answer is found by."""
    return Key(benchmark, *question, method.label)


def _blanks(tokenizer: Any, example: Example, method: Method) -> dict[str, Record]:
    """The records of an example's turns, by sample, with what is known before anything runs."""
    return {turn.sample: _blank(tokenizer, turn, method) for turn in example.turns if turn.references}


def _blank(tokenizer: Any, turn: Example, method: Method) -> Record:
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
        prompt_tokens=len(turn.prompt_ids),
        reused_tokens=0,
        new_tokens=0,
        tokens=[],
        stopped=False,
        prefill_s=0.0,
        build_s=0.0,
        decode_s=0.0,
        device_bytes=0,
        host_bytes=0,
        prompt_sha256=hashlib.sha256(np.asarray(turn.prompt_ids, dtype="<i8").tobytes()).hexdigest(),
        meta={**turn.meta, "max_new_tokens": turn.max_new_tokens},
        prompt_tail=str(tokenizer.decode(turn.prompt_ids[-_TAIL_TOKENS:])),
        question=turn.place,
    )


def _conversation(run: Run, example: Example, method: Method, begin: Callable[[Method], _Begun]) -> Iterator[Record]:
    """Every turn of an example in one cache of `method`. Where a turn fails, those after it have failed as well."""
    engine, blanks = run.engine, _blanks(run.loaded.tokenizer, example, method)
    with ExitStack() as held:
        try:
            cache, logits, prefill_s, began, prefill = begin(method)
            held.callback(cache.close)
            prompt_tokens, unfed = len(example.input_ids), list[int]()
            for turn in example.turns:
                if turn is not example:
                    logits = engine.extend(cache, torch.tensor([[*unfed, *turn.input_ids]]))
                built = run.now()
                if not turn.references:
                    continue
                bytes_held, tokens_held = cache.nbytes(), cache.get_seq_length()
                stop_ids = run.loaded.stop_ids.union(turn.stop_ids)
                resumed = time.perf_counter()
                limits = (turn.max_new_tokens, stop_ids, turn.min_new_tokens)
                tokens = engine.decode(cache, logits, *limits, turn.chooser())[0]
                ended = run.now()
                unfed = tokens[-1:] if len(tokens) == turn.max_new_tokens else []
                said = read_answer(run.loaded.tokenizer, tokens, turn.thinking)
                later = tokens_held - prompt_tokens
                blank = blanks[turn.sample]
                answered = replace(
                    blank,
                    score=run.task.score(turn, said.prediction),
                    status="ok",
                    prediction=said.prediction,
                    prompt_tokens=tokens_held,
                    reused_tokens=prefill.reused_tokens if prefill else 0,
                    new_tokens=len(tokens),
                    tokens=tokens,
                    stopped=len(tokens) < turn.max_new_tokens,
                    prefill_s=prefill_s,
                    build_s=built - began,
                    decode_s=ended - resumed,
                    device_bytes=bytes_held.device,
                    host_bytes=bytes_held.host,
                    attended_tokens=method.attended_tokens(engine.dims, prompt_tokens, later),
                    bus_bytes=method.bus_bytes(engine.dims, tokens_held),
                    meta={**blank.meta, **said.meta, **_diagnosis(run, example, prefill, method)},
                )
                del blanks[turn.sample]
                yield answered
                began = time.perf_counter()
        except FAILURES as failure:
            fed = example.fed
            told = failure if fed is None else located(engine, [*example.input_ids, *fed], failure)
            yield from (_failed(blank, told) for blank in blanks.values())


def _diagnosis(run: Run, example: Example, prefill: Prefill | None, method: Method) -> dict[str, Any]:
    """What to add to a record; where the comparison fails, why, since the answer itself stands."""
    fed = example.fed
    if not run.diagnostics or fed is None or prefill is None or example.meta.get("answer", 1) > 1:
        return {}  # of several answers to a prompt, what is compared would be the same
    try:
        found = diagnose(run.engine, prefill, method, example.max_new_tokens, run.loaded.stop_ids, fed)
    except FAILURES as failure:
        return {"diagnostics_error": one_line(failure)}
    return {"diagnostics": asdict(found)}


def _failed(blank: Record, failure: BaseException) -> Record:
    return replace(blank, status=status_of(failure), error=one_line(failure))
