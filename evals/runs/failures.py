"""What one answer or measurement may fail with, without taking its run down."""

from __future__ import annotations

import torch

from shadowkv.common.errors import SkvError

# Anything else is a bug and ends the run.
FAILURES = (RuntimeError, MemoryError, SkvError)
_SAID = ("can't allocate memory", "out of memory")  # by allocators that have no exception of their own


def status_of(failure: BaseException) -> str:
    """`oom` for memory that ran out, on the device or the host; `error` for the rest."""
    text = str(failure).lower()
    short = isinstance(failure, torch.OutOfMemoryError | MemoryError) or any(words in text for words in _SAID)
    return "oom" if short else "error"
