"""Times of single kernels on a GPU, by its own clock, and what the machine can do: the rates they are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from evals.bench.timing import Clock, step_times
from shadowkv.planning.gpus import Rates

_SHORT_MS, _SHORT_CALLS = 0.1, 10  # launching a graph takes a few us, which is nothing beside what is longer
_LEAST_FLUSH_BYTES = 2**29  # also long enough for the host to launch what comes after it
_COPIED_BYTES = 2**30
_MATMUL_SIZE = 8192


class GpuTimer:
    """Milliseconds of calls of which each finds the cache cold."""

    def __init__(self, device: torch.device, warmup: int, steps: int) -> None:
        self._device, self._warmup, self._steps = device, warmup, steps
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(max(4 * cache_bytes, _LEAST_FLUSH_BYTES), dtype=torch.uint8, device=device)
        self._cache = self._flushed[: 2 * cache_bytes]

    def replayed(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Times by CUDA events of calls that never ask the device, as graphs, so that launching them takes no part.

        Several calls take turns. Short ones are several calls to a graph, each behind a flush of the cache, less the
        time that flushes alone take.
        """
        alone = self._timed([_captured(call) for call in calls])
        if np.median(alone) >= _SHORT_MS:
            return alone
        turns = in_turns(calls, _SHORT_CALLS)
        flushes = float(np.median(self._timed([_captured(lambda: [self._cache.zero_() for _ in turns])])))
        both = self._timed([_captured(lambda: [(self._cache.zero_(), call()) for call in turns])])
        return [(ms - flushes) / len(turns) for ms in both]

    def _timed(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
        turns = cycle(graphs)
        for graph in islice(turns, self._warmup):
            graph.replay()
        marks = []
        for graph in islice(turns, self._steps):
            self._flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) for start, end in marks]

    def waited(self, call: Callable[[], object], most: int | None = None) -> list[float]:
        """Times by the host's clock of a call that waits for the device, its work on the host included.

        `most` is for calls of seconds: no more than so many, after one that does not count.
        """

        def step() -> None:
            call()

        if most is None:
            return step_times(step, self._warmup, self._steps, Clock(self._device))
        return step_times(step, min(self._warmup, 1), min(most, self._steps), Clock(self._device))

    def rates(self, dtype: torch.dtype) -> Rates:
        """What this machine reaches now: a copy on the device, one from pinned memory, a square product in `dtype`.

        A copy counts what it reads and what it writes, so a kernel that mostly reads can exceed it by a little.
        """
        device = self._device
        source, target = (torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
        host = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        a, b = (torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        return Rates(
            2 * _COPIED_BYTES / self._median_s(lambda: target.copy_(source)),
            _COPIED_BYTES / self._median_s(lambda: target.copy_(host, non_blocking=True)),
            2 * _MATMUL_SIZE**3 / self._median_s(lambda: torch.mm(a, b, out=product)),
        )

    def _median_s(self, call: Callable[[], Tensor]) -> float:
        return float(np.median(self.replayed([call]))) / 1000


def in_turns(calls: Sequence[Callable[[], object]], least: int) -> list[Callable[[], object]]:
    """At least so many calls, each as often as the others."""
    return list(calls) * -(-least // len(calls))


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    # What is compiled, tuned or allocated at a first call must not be while capturing.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph
