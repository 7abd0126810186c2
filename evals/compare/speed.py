"""Two sweeps of one machine model: speeds as ratios of repeats, sizes as ratios of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from evals.bench.records import BenchRecord
from evals.bench.timing import spread
from evals.common.grouping import grouped
from evals.compare.accuracy import size_row
from evals.compare.gate import MEMORY, THROUGHPUT, Gate
from evals.compare.paired import holm
from evals.compare.rows import Comparison, RatioRow
from evals.compare.sides import Side, other_parameters, refuse, refuse_different
from evals.compare.verdicts import Decision, Verdict, judge, open_question
from evals.tables.table import tokens
from shadowkv.common.errors import SkvError

_SIZES: Sequence[tuple[str, Callable[[BenchRecord], int | None]]] = (
    ("KV on device", lambda record: record.kv_device_bytes),
    ("KV on host", lambda record: record.kv_host_bytes),
    ("device peak", lambda record: record.peak_device_bytes),
)


class _Cell(NamedTuple):
    method: str
    context: int
    batch: int

    @property
    def place(self) -> str:
        return f"{tokens(self.context)} x {self.batch}"


Sweep = dict[_Cell, list[BenchRecord]]


class Welch(NamedTuple):
    """Welch's test of two speeds, and the 95 % interval of their ratio."""

    p: float
    low: float
    high: float


class Speed(NamedTuple):
    """Two samples of speeds, each of its own session, on a logarithmic scale."""

    before: Sequence[float]  # tokens per second, by repeat
    after: Sequence[float]

    @property
    def ratio(self) -> float:
        """Of the geometric means."""
        return float(np.exp(np.mean(np.log(self.after)) - np.mean(np.log(self.before))))

    @property
    def repeats(self) -> int:
        return min(len(self.before), len(self.after))

    @property
    def deviation(self) -> float:
        """Of the difference of two repeats, one of each session, in logarithms."""
        return float(np.sqrt(np.var(np.log(self.before), ddof=1) + np.var(np.log(self.after), ddof=1)))

    def test(self) -> Welch | None:
        """None where a side has no two repeats."""
        from scipy.stats import ttest_ind

        if self.repeats < 2:
            return None
        if not self.deviation:  # nothing to test against: alike, or different beyond doubt
            return Welch(float(self.before[0] == self.after[0]), self.ratio, self.ratio)
        found = ttest_ind(np.log(self.after), np.log(self.before), equal_var=False)
        low, high = np.exp(found.confidence_interval(0.95))
        return Welch(float(found.pvalue), float(low), float(high))


def compare_sweeps(baseline: Side[BenchRecord], current: Side[BenchRecord], gate: Gate) -> Comparison:
    """Compare two sweeps. Raises `SkvError` where they are of other machines or other work."""
    refuse_different(baseline.manifest, current.manifest, frozenset())
    refuse(other_parameters(baseline.manifest, current.manifest))
    fields = ("dtype", "device")
    models = [(key, baseline.manifest.model.get(key), current.manifest.model.get(key)) for key in fields]
    refuse([f"model.{key}: {before} -> {after}" for key, before, after in models if before != after])
    machines = sorted({record.machine for side in (baseline, current) for record in side.records})
    refuse([f"machines: {'; '.join(machines)}"] if len(machines) > 1 else [])
    contexts = [sorted({record.context for record in side.records}) for side in (baseline, current)]
    refuse([] if contexts[0] == contexts[1] else [f"contexts: {contexts[0]} -> {contexts[1]}"])
    before, after = _sweep(baseline), _sweep(current)
    notes = _notes(baseline, current, before, after)
    shared = [cell for cell in before if cell in after]
    if not shared:
        raise SkvError("no measurement in common: no method at the same context and batch")
    return Comparison(
        baseline.described,
        current.described,
        current.manifest.title,
        gate,
        [],
        [*_speeds(before, after, shared, gate), *_bytes(before, after, shared, gate)],
        notes,
    )


def _sweep(side: Side[BenchRecord]) -> Sweep:
    return grouped(side.records, lambda r: _Cell(r.method, r.context, r.batch))


def _notes(baseline: Side[BenchRecord], current: Side[BenchRecord], before: Sweep, after: Sweep) -> list[str]:
    notes = []
    for side, own, other in ((baseline, before, after), (current, after, before)):
        alone = [f"{cell.method} @ {cell.place}" for cell in own if cell not in other]
        if alone:
            notes.append(f"only in {side.name}: {', '.join(alone)}")
    said = {f"{side.name}: {note}" for side in (baseline, current) for note in side.manifest.notes}
    return [*notes, *sorted(said)]


def decide_speeds(speeds: Sequence[Speed], tolerance: float) -> list[Decision]:
    """Verdicts on ratios of speed that share one error rate."""
    found = [speed.test() for speed in speeds]
    corrected = iter(holm([test.p for test in found if test is not None]))
    tests = sum(test is not None for test in found)
    return [
        _decide(speed, test, None if test is None else next(corrected), tests, tolerance)
        for speed, test in zip(speeds, found, strict=True)
    ]


def _decide(speed: Speed, test: Welch | None, p_holm: float | None, tests: int, tolerance: float) -> Decision:
    if test is None or p_holm is None:
        return Decision(Verdict.UNDECIDED, why="one repeat says nothing of the spread")
    half_width = max(test.high - speed.ratio, speed.ratio - test.low)
    alike = sorted(speed.before) == sorted(speed.after)
    verdict = judge(speed.ratio - 1, half_width, p_holm, tolerance, alike=alike)
    return open_question(Decision(verdict, test.p, p_holm), speed.deviation, speed.repeats, tests, tolerance)


def _speeds(before: Sweep, after: Sweep, shared: Sequence[_Cell], gate: Gate) -> list[RatioRow]:
    speeds = [Speed(_rates(before[cell]), _rates(after[cell])) for cell in shared]
    decisions = decide_speeds(speeds, gate.tolerances[THROUGHPUT])
    return [
        _speed_row(cell, speed, _ended(before[cell], after[cell]) or decision)
        for cell, speed, decision in zip(shared, speeds, decisions, strict=True)
        if speed.before or speed.after
    ]


def _ended(before: Sequence[BenchRecord], after: Sequence[BenchRecord]) -> Decision | None:
    """What there is to say where one of the two could not be measured at all."""
    then, now = (any(r.status == "ok" for r in records) for records in (before, after))
    if then == now:
        return None
    if then:
        return Decision(Verdict.WORSE, why=f"ran before, now {after[-1].status}")
    return Decision(Verdict.BETTER, why=f"runs now, was {before[-1].status}")


def _speed_row(cell: _Cell, speed: Speed, decision: Decision) -> RatioRow:
    spreads, test = [spread(rates) for rates in speed], speed.test()
    return RatioRow(
        metric=THROUGHPUT,
        method=cell.method,
        place=cell.place,
        verdict=decision.verdict,
        more_needed=decision.more_needed,
        why=decision.why,
        what="tokens/s",
        before=_mean(speed.before),
        after=_mean(speed.after),
        ratio=speed.ratio if speed.repeats else None,
        low=test and test.low,
        high=test and test.high,
        spread_before=spreads[0] and spreads[0].relative,
        spread_after=spreads[1] and spreads[1].relative,
        repeats=speed.repeats,
        p=decision.p,
        p_holm=decision.p_holm,
    )


def _bytes(before: Sweep, after: Sweep, shared: Sequence[_Cell], gate: Gate) -> list[RatioRow]:
    """Sizes of repeats that both runs finished, paired by their number."""
    rows = []
    for cell in shared:
        old, new = ({r.repeat: r for r in sweep[cell] if r.status == "ok"} for sweep in (before, after))
        repeats = sorted(old.keys() & new.keys())
        for what, size in _SIZES:
            pairs = [(size(old[n]), size(new[n])) for n in repeats]
            known = [(b, a) for b, a in pairs if b is not None and a is not None]
            rows += size_row(cell.method, cell.place, what, [b for b, _ in known], [a for _, a in known], gate)
        rows += _ran_out(cell, before[cell], after[cell])
    return rows


def _ran_out(cell: _Cell, before: Sequence[BenchRecord], after: Sequence[BenchRecord]) -> list[RatioRow]:
    """Memory that ran out in one of the runs is a size too: too much."""
    ended = _ended(before, after)
    if ended is None or "oom" not in (before[-1].status, after[-1].status):
        return []
    blank = dict.fromkeys(("before", "after", "ratio", "low", "high", "spread_before", "spread_after", "p", "p_holm"))
    return [RatioRow(MEMORY, cell.method, cell.place, ended.verdict, None, ended.why, "fits", **blank, repeats=0)]


def _rates(records: Sequence[BenchRecord]) -> list[float]:
    return [rate for r in records if r.status == "ok" and (rate := r.tokens_per_s) is not None]


def _mean(rates: Sequence[float]) -> float | None:
    return float(np.exp(np.mean(np.log(rates)))) if rates else None
