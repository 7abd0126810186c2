"""A simulated clock: work that waits for other work, on resources that do one thing at a time in the order given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Task(NamedTuple):
    """Work on one resource, which begins when what was given to the resource before is done, and so are others."""

    resource: str
    ms: float
    after: tuple[int, ...] = ()  # numbers of earlier tasks


def ends_ms(tasks: Sequence[Task]) -> list[float]:
    """When each task ends.

    Ends only grow with durations and with what is waited for, so whatever takes a wait away makes nothing later.
    """
    free: dict[str, float] = {}
    ends: list[float] = []
    for task in tasks:
        begins = max([free.get(task.resource, 0.0), *(ends[number] for number in task.after)])
        ends.append(begins + task.ms)
        free[task.resource] = ends[-1]
    return ends
