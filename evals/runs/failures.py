"""What one answer or measurement may fail with, without taking its run down."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shadowkv.common.errors import NotFiniteError, SkvError
from shadowkv.engine.engine import Engine
from shadowkv.engine.finite import where_not_finite

# Anything else is a bug and ends the run.
FAILURES = (RuntimeError, MemoryError, SkvError)
_SAID = ("can't allocate memory", "out of memory")  # by allocators that have no exception of their own


def status_of(failure: BaseException) -> str:
    """`oom` for memory that ran out, on the device or the host; `error` for the rest."""
    text = str(failure).lower()
    short = isinstance(failure, torch.OutOfMemoryError | MemoryError) or any(words in text for words in _SAID)
    return "oom" if short else "error"


def located(engine: Engine, prompt: Sequence[int], failure: BaseException) -> BaseException:
    """What an answer to `prompt` failed with; of numbers that overflow, with the layer where they do."""
    if not isinstance(failure, NotFiniteError):
        return failure
    try:
        return where_not_finite(engine, torch.tensor([[*prompt, *failure.answer]]), failure)
    except FAILURES:
        return failure  # a place that cannot be found, such as for want of memory, makes it no less of a failure
