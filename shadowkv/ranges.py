"""Names for stretches of a decode step, seen by torch's profiler and free where none runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.autograd import profiler

P = ParamSpec("P")
T = TypeVar("T")
PREFIX = "skv::"


def ranged(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Report the function's time to a running profiler as `skv::<name>`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            if not profiler._is_profiler_enabled:  # torch keeps it for exactly this: one look instead of a range
                return function(*args, **kwargs)
            with profiler.record_function(PREFIX + name):
                return function(*args, **kwargs)

        return run

    return decorate
