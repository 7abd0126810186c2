"""Work beside the main stream of a GPU; on a CPU it simply happens in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def beside(device: torch.device, *, first: bool = False) -> Iterator[Callable[[], None]]:
    """Queue the block on a side stream, after all that the current stream has so far.

    Yields a function that makes the current stream wait for the block. What the block reads must stay alive until
    then. Works within the capture of a CUDA graph.

    first: whether its kernels go before others that are ready too. Those of one stream queue behind a full GPU until
    every block of a kernel that came earlier has begun, and what a step waits for should not.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(device), _side_stream(device, first)
    side.wait_stream(main)
    finished = torch.cuda.Event()
    with torch.cuda.stream(side):
        yield lambda: main.wait_event(finished)
        finished.record(side)


def join_captured() -> None:
    """Have the current stream, which is captured, wait for all side streams that its capture has reached.

    A capture that is broken off between a block and the wait for it cannot be ended otherwise.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    main = torch.cuda.current_stream(device)
    for first in (False, True):
        side = _side_stream(device, first)
        with torch.cuda.stream(side):
            captured = torch.cuda.is_current_stream_capturing()
        if captured:
            main.wait_stream(side)


@cache
def _side_stream(device: torch.device, first: bool) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1 if first else 0)
