"""Times as distributions: warm-up, synchronised steps, percentiles, and how far repeats lie apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch


class Distribution(NamedTuple):
    """Percentiles of step times, in ms."""

    p10: float
    p50: float
    p90: float


class Spread(NamedTuple):
    """What repeats of one measurement gave."""

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """Half of the way from the lowest to the highest, as a share of the median."""
        return (self.high - self.low) / (2 * self.median) if self.median else 0.0


class Clock:
    """Seconds after everything queued on a device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def step_times(
    step: Callable[[], None], warmup: int, steps: int, clock: Clock, before: Callable[[], None] | None = None
) -> list[float]:
    """Milliseconds of each of `steps` steps, after `warmup` that do not count, and without what comes before each."""
    if before is not None:
        return [_time_of(step, clock, before) for _ in range(warmup + steps)][warmup:]
    for _ in range(warmup):
        step()
    marks = [clock.now()]
    for _ in range(steps):
        step()
        marks.append(clock.now())
    return [1000 * (after - before) for before, after in pairwise(marks)]


def _time_of(step: Callable[[], None], clock: Clock, before: Callable[[], None]) -> float:
    before()
    began = clock.now()
    step()
    return 1000 * (clock.now() - began)


def distribution(values: Sequence[float]) -> Distribution | None:
    """p10, p50 and p90, or None of nothing."""
    return Distribution(*map(float, np.percentile(values, [10, 50, 90]))) if len(values) else None


def spread(values: Sequence[float]) -> Spread | None:
    """Median, lowest and highest, or None of nothing."""
    return Spread(float(np.median(values)), float(min(values)), float(max(values))) if len(values) else None


def paired_ratios(mine: Mapping[Hashable, float], theirs: Mapping[Hashable, float]) -> Spread | None:
    """mine / theirs within each repeat that both have, since those were measured side by side."""
    return spread([rate / theirs[repeat] for repeat, rate in mine.items() if repeat in theirs])
