"""Where a decode step's time goes: the ranges that a torch profiler sees, summed by part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.profiler import ProfilerActivity, profile, record_function

from evals.bench.conditions import conditions
from evals.bench.engines import Contender
from evals.bench.measuring import Bench
from evals.bench.memory import release
from evals.bench.records import Cell, Measurement
from evals.bench.timing import Clock, step_times
from evals.runs.failures import FAILURES, status_of
from shadowkv.common.ranges import PREFIX, module_ranges
from shadowkv.common.wording import one_line

# In the order of a step; `other` is what no range covers: norms, RoPE, embeddings, Python between them.
PARTS = ("selection", "fetch", "rebuild", "attention", "projections", "mlp", "head", "sampling", "other")
_STEP = f"{PREFIX}step"


@dataclass(frozen=True)
class LatencyRecord(Measurement):
    """One method at a context and a batch: mean ms of each part of a profiled step."""

    FILE: ClassVar[str] = "latency.jsonl"

    parts_ms: dict[str, float] = field(default_factory=dict)
    profiled_ms: float | None = None  # of the step, mean
    plain_ms: float | None = None  # of a step without the profiler, median
    steps: int = 0
    clock: str = "cpu"  # whose time the parts are: cpu or device
    waiting_ms: float | None = None  # of the device, within a profiled step; None on a CPU
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def slowed(self) -> float | None:
        """How much longer a profiled step took than a plain one, as a share."""
        return self.profiled_ms / self.plain_ms - 1 if self.profiled_ms and self.plain_ms else None


def measure_latency(bench: Bench, contender: Contender, cell: Cell, trace: Path | None = None) -> LatencyRecord:
    """Profile one cell; with `trace`, write what the profiler saw as a Chrome trace, which Perfetto opens."""
    device = bench.engine.model.device
    release(device)
    before, started = conditions(device), datetime.now(UTC).isoformat(timespec="seconds")
    try:
        bench.check_room(contender, cell.context, cell.batch, bench.new_tokens + bench.steps)
        parts, plain = _profiled(bench, contender, cell, trace)
    except FAILURES as failure:
        status, said = status_of(failure), one_line(failure)
    else:
        return LatencyRecord(
            *cell,
            status="ok",
            error=None,
            machine=bench.machine,
            started=started,
            parts_ms={name: round(ms, 4) for name, ms in parts.by_part.items()},
            profiled_ms=round(parts.step_ms, 4),
            plain_ms=round(plain, 4),
            steps=bench.steps,
            clock=parts.clock,
            waiting_ms=parts.waiting_ms,
            conditions={"before": before, "after": conditions(device)},
        )
    bench.engine.forget()
    release(device)
    return LatencyRecord(*cell, status, said, bench.machine, started, conditions={"before": before})


@dataclass(frozen=True)
class Parts:
    """Means over steps, in ms; `by_part` adds up to the step, or to the device's share of it."""

    by_part: dict[str, float]
    step_ms: float
    clock: str
    waiting_ms: float | None


def _profiled(bench: Bench, contender: Contender, cell: Cell, trace: Path | None) -> tuple[Parts, float]:
    device = bench.engine.model.device
    on_gpu = device.type == "cuda"
    clock = Clock(device)
    decoding = contender.start(cell.context, cell.batch)
    try:
        with decoding.awake():
            plain = float(np.median(step_times(decoding.step, bench.warmup_steps, bench.steps, clock)))
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            with module_ranges(bench.engine.model):
                decoding.step()  # the first one with hooks pays for them
                with profile(activities=activities) as seen:
                    for _ in range(bench.steps):
                        with record_function(_STEP):
                            decoding.step()
                            clock.now()
            if trace is not None:
                seen.export_chrome_trace(str(trace))
            return parts_of(seen.events() or [], bench.steps, on_gpu=on_gpu), plain
    finally:
        decoding.close()


def parts_of(events: Iterable[Any], steps: int, *, on_gpu: bool) -> Parts:
    """Sum the profiler's events by the outermost of our ranges that they lie in, within each step.

    On a GPU the parts are of the time of its kernels, and what remains of a step is waiting: for the host, or for
    kernels to be launched.
    """
    tops = [event for event in events if event.name == _STEP]
    spent = _kernels_us if on_gpu else _cpu_us
    found = dict.fromkeys(PARTS, 0.0)
    whole = total = 0.0
    for top in tops:
        whole += top.cpu_time_total
        total += spent(top)
        for part in _outermost(top):
            found[part.name.removeprefix(PREFIX)] += spent(part)
    found["other"] = max(total - sum(found.values()), 0.0)
    scale = 1 / (1000 * steps)
    waiting = round(max(whole - total, 0.0) * scale, 4) if on_gpu else None
    by_part = {name: microseconds * scale for name, microseconds in found.items()}
    return Parts(by_part, whole * scale, "device" if on_gpu else "cpu", waiting)


def _cpu_us(event: Any) -> float:
    return float(event.cpu_time_total)


def _kernels_us(event: Any) -> float:
    """Time of all kernels launched within an event; a range is there once more as a stretch of the GPU's time."""
    own = sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith(PREFIX))
    return float(own + sum(map(_kernels_us, event.cpu_children)))


def _outermost(event: Any) -> Iterable[Any]:
    for child in event.cpu_children:
        if child.name.startswith(PREFIX):
            yield child
        else:
            yield from _outermost(child)
