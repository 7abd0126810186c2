"""Every kernel beside its plain-torch twin: the same result first, and only then how fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from evals.bench.conditions import conditions
from evals.bench.kernels.gpu_timing import GpuTimer
from evals.bench.kernels.items import Call, Item, NotHereError, Subject, Way
from evals.bench.memory import release
from evals.bench.timing import Distribution, distribution
from evals.runs.failures import FAILURES, status_of
from shadowkv.common.wording import one_line
from shadowkv.planning.gpus import Rates

_SLOW_STEPS = 3  # of what takes seconds


class KernelKey(NamedTuple):
    """What a record measures."""

    kernel: str
    variant: str
    way: str


@dataclass(frozen=True)
class KernelRecord:
    """What was found of one kernel, or of another way to its result, on one set of inputs."""

    FILE: ClassVar[str] = "kernels.jsonl"

    kernel: str
    variant: str
    way: str  # triton, interpreter, torch, or what is measured beside a kernel
    status: str  # ok, wrong, oom or error; skipped is another way that is not to be had here
    error: str | None
    machine: str
    started: str
    relative_error: float | None = None  # to the twin; None where one of them has a number and the other has none
    bound: float | None = None
    ms: list[float] = field(default_factory=list)  # empty where a time would say nothing: on a CPU, or of wrong results
    moved_bytes: int = 0
    over_link: bool = False
    flop: int = 0
    peak_bytes_per_s: float | None = None  # of the path that the bytes take, measured in the same run
    peak_flop_per_s: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> KernelKey:
        return KernelKey(self.kernel, self.variant, self.way)

    @property
    def final(self) -> bool:
        """A result that is wrong may have been mended since."""
        return self.status in ("ok", "oom", "skipped")

    @property
    def times(self) -> Distribution | None:
        return distribution(self.ms)

    @property
    def bytes_per_s(self) -> float | None:
        return 1000 * self.moved_bytes / self.times.p50 if self.times and self.moved_bytes else None

    @property
    def flop_per_s(self) -> float | None:
        return 1000 * self.flop / self.times.p50 if self.times and self.flop else None

    @property
    def share_of_bytes(self) -> float | None:
        """Of the measured rate of the path."""
        peak, reached = self.peak_bytes_per_s, self.bytes_per_s
        return reached / peak if peak and reached else None

    @property
    def share_of_flop(self) -> float | None:
        """Of the measured rate of a square product."""
        peak, reached = self.peak_flop_per_s, self.flop_per_s
        return reached / peak if peak and reached else None


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference, over the largest magnitude there is; of whole numbers, the share that differs.

    Infinite where shapes or types differ, or where one is NaN and the other is not.
    """
    worst = 0.0
    for mine, theirs in zip(got, wanted, strict=True):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return math.inf
        if not theirs.is_floating_point():
            worst = max(worst, float((mine != theirs).float().mean()))
            continue
        known = ~theirs.isnan()
        if not torch.equal(mine.isnan(), ~known):
            return math.inf
        if bool(known.any()):
            exact = theirs[known].float()
            apart = float((mine[known].float() - exact).abs().max())
            worst = max(worst, apart / max(float(exact.abs().max()), torch.finfo(torch.float32).tiny))
    return worst if math.isfinite(worst) else math.inf


@dataclass(frozen=True)
class KernelBench:
    """Where to measure. Without a timer nothing is timed; `rates` are those that the timer found."""

    device: torch.device
    machine: str
    way: str
    timer: GpuTimer | None = None
    rates: Rates | None = None

    def measure(self, item: Item) -> list[KernelRecord]:
        """The record of a kernel, and those of what is measured beside it. None takes down another, or the run."""
        release(self.device)
        before = {"before": conditions(self.device)}
        started = datetime.now(UTC).isoformat(timespec="seconds")
        own = item.way or self.way
        blank = KernelRecord(item.kernel, item.variant, own, "ok", None, self.machine, started, conditions=before)
        try:
            torch.manual_seed(0)
            subject = item.make()
            wanted = _results(subject.twins, subject.changed)
        except FAILURES as failure:
            return [_failed(blank, failure)]
        kernel = Way(own, lambda: subject.calls, subject.capturable)
        return [self._tried(replace(blank, way=way.name), subject, way, wanted) for way in (kernel, *subject.besides)]

    def _tried(self, blank: KernelRecord, subject: Subject, way: Way, wanted: Sequence[Tensor]) -> KernelRecord:
        try:
            return self._measured(blank, subject, way, wanted)
        except NotHereError as missing:
            failed = replace(blank, status="skipped", error=one_line(missing))
        except FAILURES as failure:
            failed = _failed(blank, failure)
        # Only here has the exception gone, and with its frames the tensors that they held.
        release(self.device)
        return failed

    def _measured(self, blank: KernelRecord, subject: Subject, way: Way, wanted: Sequence[Tensor]) -> KernelRecord:
        calls = way.make()
        # What compiles does so in this first call: no time holds it.
        error = (subject.error or relative_error)(_results(calls, subject.changed), wanted)
        agrees = error <= subject.bound
        rates = self.rates if agrees else None
        return replace(
            blank,
            status="ok" if agrees else "wrong",
            error=None if agrees else "does not give what its plain-torch twin gives",
            relative_error=error if math.isfinite(error) else None,
            bound=subject.bound,
            ms=[round(ms, 5) for ms in self._times(subject, calls, way.capturable)] if agrees else [],
            moved_bytes=subject.moved_bytes,
            over_link=subject.over_link,
            flop=subject.flop,
            peak_bytes_per_s=None if rates is None else _path(rates, subject),
            peak_flop_per_s=None if rates is None else rates.flop,
        )

    def _times(self, subject: Subject, calls: Sequence[Call], capturable: bool) -> list[float]:
        if self.timer is None:
            return []
        own = [x.clone() for x in subject.changed]
        bound = [_bind(call, own) for call in calls]
        if capturable:
            return self.timer.replayed(bound)
        return self.timer.waited(bound[0], None if subject.capturable else _SLOW_STEPS)


def _failed(blank: KernelRecord, failure: BaseException) -> KernelRecord:
    return replace(blank, status=status_of(failure), error=one_line(failure))


def _path(rates: Rates, subject: Subject) -> float:
    return rates.link_bytes if subject.over_link else rates.bandwidth_bytes


def _bind(call: Call, changed: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: call(*changed)


def _results(calls: Sequence[Call], changed: Sequence[Tensor]) -> list[Tensor]:
    """All that calls return, and what they make of tensors of their own."""
    own = [x.clone() for x in changed]
    returned = [call(*own) for call in calls]
    return [*own, *(x for x in returned if x is not None)]
