"""Who answers an accuracy run: this process, or several, each with the model on a GPU of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from cli.shared.asked import AskedModel
from cli.shared.options import Settings
from cli.shared.quiet import quieten

if TYPE_CHECKING:
    from evals.runs.manifest import Circumstances
    from evals.runs.results import RunFolder
    from evals.runs.run import Run
    from evals.runs.runner import Step
    from evals.runs.task import Question, Task
    from shadowkv.contract.method import Method

    Answer = Callable[[RunFolder[Any], Callable[[Step], None]], None]


def check_workers(count: int, device: str) -> None:
    """Refuse more processes than there are GPUs for."""
    import torch

    from shadowkv.common.errors import SkvError

    if count < 1:
        raise SkvError(f"--workers must be at least 1, got {count}")
    if count > 1 and ":" in device:
        raise SkvError(f"--workers gives each process a GPU of its own; leave out --device {device}")
    if count > 1 and device == "cuda" and torch.cuda.device_count() < count:
        raise SkvError(f"--workers {count} needs as many GPUs, and {torch.cuda.device_count()} are here")


def processes(settings: Settings, questions: Sequence[Question]) -> int:
    """How many share these questions: no more than there are."""
    return min(settings.workers, len(questions))


@contextmanager
def answering(
    settings: Settings, task: Task, questions: Sequence[Question], methods: Sequence[Method]
) -> Iterator[tuple[Circumstances, Answer]]:
    """The model loaded, and what answers these questions into a run folder."""
    from evals.runs.runner import run_accuracy
    from evals.runs.workers import started

    begin = partial(_begin, settings, task, methods)
    count = processes(settings, questions)
    if count == 1:
        run, told = begin(0, 1)
        yield told, partial(run_accuracy, run, questions, methods)
        return
    with started(count, begin, methods) as workers:
        yield workers.told, partial(workers.run_accuracy, task, questions, methods)


def _begin(
    settings: Settings, task: Task, methods: Sequence[Method], place: int, count: int
) -> tuple[Run, Circumstances]:
    """Load the model in the process that answers, `place` of `count`."""
    import torch

    from evals.runs.manifest import Circumstances, model_entry, session_of
    from evals.runs.run import Run
    from shadowkv.engine.engine import Engine
    from shadowkv.models.calibrated import check_weights

    if count > 1 and "--debug" not in sys.argv:
        quieten()
    asked = AskedModel(settings, dummy=settings.dummy)
    if count > 1 and asked.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    elif count > 1:
        asked.device = f"cuda:{place}"
    loaded = asked.load()
    engine = Engine(
        loaded.model,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        reuse_prefix=settings.reuse_prefix,
        record_queries=any(method.needs_prompt_queries for method in methods),
    )
    for method in methods:
        method.check(engine.dims)
        check_weights(method, loaded)
    run = Run(engine, loaded, task, diagnostics=settings.diagnostics, streamed=settings.stream)
    return run, Circumstances(model_entry(loaded), engine.prefill_chunk_tokens, session_of(loaded))
