"""One run answered by several processes side by side, for machines with several GPUs.

Each process loads the model for itself and answers its share of the questions; every record goes to the one that
started them, which alone writes the run folder. A prompt is answered by all methods in the same process, as ever.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from evals.common.grouping import grouped
from evals.runs.manifest import Circumstances
from evals.runs.results import Key, RunFolder
from evals.runs.run import Run
from evals.runs.runner import Answered, Step, key_of, run_accuracy
from evals.runs.task import Question, Task
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import Method

# Run in a process of its own: `place` of `count` processes -> the model in its engine, and what it tells of it.
Begin = Callable[[int, int], tuple[Run, Circumstances]]


class _Share(NamedTuple):
    """What one process is to answer, and what of it is answered already."""

    questions: Sequence[Question]
    answered: Collection[Hashable]


@dataclass(frozen=True)
class Workers:
    """Processes that have loaded their models; use `started`."""

    processes: Sequence[BaseProcess]
    connections: Sequence[Connection]
    told: Circumstances  # by the first of them

    def run_accuracy(
        self,
        task: Task,
        questions: Sequence[Question],
        methods: Sequence[Method],
        folder: RunFolder[Any],
        on_step: Callable[[Step], None] = lambda _: None,
    ) -> None:
        """`evals.runs.runner.run_accuracy`, by all of them. Raises `SkvError` if one ends early; what came stays."""
        keys = {q: [key_of(task.benchmark, q, method) for method in methods] for q in questions}
        answered = {key for same in keys.values() for key in same if folder.has(key)}
        todo = [question for question in questions if not answered.issuperset(keys[question])]
        prompts = list(grouped(todo, task.prompt_of).values())
        done, total = len(answered), len(questions) * len(methods)
        on_step(Step(done, total, None))
        for place, connection in enumerate(self.connections):
            share = chain.from_iterable(prompts[place :: len(self.connections)])
            connection.send(_Share(list(share), answered))
        for record in self._arriving():
            folder.append(record)
            done += 1
            on_step(Step(done, total, record))

    def _arriving(self) -> Iterator[Answered]:
        """Records until every process has said that it is done."""
        open_ones = list(self.connections)
        while open_ones:
            for connection in wait(open_ones):
                assert isinstance(connection, Connection)
                record = _received(connection, self.processes[self.connections.index(connection)])
                if record is None:
                    open_ones.remove(connection)
                else:
                    yield record


@contextmanager
def started(count: int, begin: Begin, methods: Sequence[Method]) -> Iterator[Workers]:
    """`count` processes, each with its model loaded; they are gone when the block ends. `begin` can be pickled."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    processes, connections = list[BaseProcess](), list[Connection]()
    try:
        for place in range(count):
            mine, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, begin, place, count, methods), daemon=True)
            worker.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            processes.append(worker)
            connections.append(mine)
        told = [_received(*pair) for pair in zip(connections, processes, strict=True)]
        yield Workers(processes, connections, told[0])
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(connection: Connection, begin: Begin, place: int, count: int, methods: Sequence[Method]) -> None:
    """What each process does."""
    try:
        run, told = begin(place, count)
        connection.send(told)
        share: _Share = connection.recv()
        run_accuracy(run, share.questions, methods, _Sent(connection, frozenset(share.answered)))
        connection.send(None)
    except SkvError as error:
        connection.send(error)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return  # whoever started this one has gone, or is about to end it


@dataclass(frozen=True)
class _Sent:
    """In place of a run folder: what is answered there, and where records go."""

    connection: Connection
    answered: Collection[Hashable]

    def has(self, key: Key) -> bool:
        return key in self.answered

    def append(self, record: Answered) -> None:
        self.connection.send(record)


def _received(connection: Connection, process: BaseProcess) -> Any:
    """The next thing that a process says. Raises `SkvError` if it fails or ends instead."""
    try:
        said = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise SkvError(
            f"one of the processes ended early (exit code {process.exitcode}); run the same command to continue"
        ) from None
    if isinstance(said, SkvError):
        raise said
    return said
