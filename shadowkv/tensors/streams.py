"""Work beside the main stream of a GPU; on a CPU it simply happens in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """Queue the block on a side stream, after all that the current stream has so far.

    Yields a function that makes the current stream wait for the block. What the block reads must stay alive until
    then. Works within the capture of a CUDA graph.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(main)
    finished = torch.cuda.Event()
    with torch.cuda.stream(side):
        yield lambda: main.wait_event(finished)
        finished.record(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
