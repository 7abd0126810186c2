"""Measurements summed up: a method at a context and a batch over its repeats, beside full attention."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from evals.bench.records import BenchRecord
from evals.bench.timing import Spread, distribution, paired_ratios, spread
from evals.common.grouping import grouped
from evals.tables.summary import REFERENCE, eight_bit_reference


@dataclass(frozen=True)
class BenchRow:
    """One method at one context and batch. Numbers are None where nothing could be measured."""

    method: str
    context: int
    batch: int
    status: str  # ok if any repeat is; otherwise that of the last one
    failure: str | None  # oom or error, of the last repeat that failed, also where others did not
    error: str | None  # what it said
    repeats: int  # measured
    failed: int  # repeats
    tokens_per_s: float | None  # median over repeats
    tokens_per_s_low: float | None
    tokens_per_s_high: float | None
    ratio: float | None  # to full attention at the same batch: median over repeats, each by itself
    ratio_low: float | None
    ratio_high: float | None
    step_ms_p10: float | None  # over the steps of all repeats; the time per output token
    step_ms_p50: float | None
    step_ms_p90: float | None
    ttft_s: float | None  # medians over repeats
    prefill_s: float | None
    build_s: float | None
    kv_device_bytes: int | None
    kv_host_bytes: int | None
    weights_bytes: int | None
    peak_device_bytes: int | None  # largest over repeats
    peak_host_bytes: int | None
    bus_bytes: int | None  # per step
    read_bytes: int | None  # per step
    stacked: bool | None
    hit_rate: float | None  # median over repeats
    eight_bit: str | None  # full attention in 8 bits, where it ran beside full attention as it comes
    eight_bit_ratio: float | None  # to it at the same batch, as `ratio`
    eight_bit_ratio_low: float | None
    eight_bit_ratio_high: float | None
    kv_ratio: float | None  # device KV to full attention's at the same batch
    eight_bit_kv_ratio: float | None

    @property
    def bus_bytes_per_s(self) -> float | None:
        return self._per_s(self.bus_bytes)

    @property
    def read_bytes_per_s(self) -> float | None:
        return self._per_s(self.read_bytes)

    def _per_s(self, moved: int | None) -> float | None:
        return None if moved is None or not self.step_ms_p50 else 1000 * moved / self.step_ms_p50

    @property
    def over_full(self) -> Spread | None:
        return _whole(self.ratio, self.ratio_low, self.ratio_high)

    @property
    def over_eight_bit(self) -> Spread | None:
        return _whole(self.eight_bit_ratio, self.eight_bit_ratio_low, self.eight_bit_ratio_high)

    @property
    def throughput(self) -> Spread | None:
        return _whole(self.tokens_per_s, self.tokens_per_s_low, self.tokens_per_s_high)


@dataclass(frozen=True)
class Gain:
    """A method against full attention at one context: each at its own best batch, and at full attention's."""

    method: str
    context: int
    batch: int
    tokens_per_s: float
    full_batch: int | None
    full_tokens_per_s: float | None
    gain: Spread | None  # at each one's own best batch
    gain_equal: Spread | None  # at full attention's best batch
    eight_bit: str | None  # full attention in 8 bits, where it ran beside full attention as it comes
    eight_bit_gain: Spread | None  # over it, at each one's own best batch

    def flat(self) -> dict[str, Any]:
        """Fields for JSON, the spreads by name."""
        spreads = {"gain": self.gain, "gain_equal": self.gain_equal, "eight_bit_gain": self.eight_bit_gain}
        return {**vars(self), **{name: found and found._asdict() for name, found in spreads.items()}}


def summarise_bench(records: Sequence[BenchRecord]) -> list[BenchRow]:
    """Rows by context, then method in order of first appearance, then batch."""
    order = {method: place for place, method in enumerate(dict.fromkeys(r.method for r in records))}
    cells = grouped(records, lambda r: (r.context, r.method, r.batch))
    keys = sorted(cells, key=lambda key: (key[0], order[key[1]], key[2]))
    eight_bit = eight_bit_reference(order)

    def beside(key: tuple[int, str, int], label: str | None) -> list[BenchRecord]:
        return [] if label is None else cells.get((key[0], label, key[2]), [])

    return [_row(cells[key], beside(key, REFERENCE), eight_bit, beside(key, eight_bit)) for key in keys]


def gains(records: Sequence[BenchRecord]) -> list[Gain]:
    """Every method that decoded at all, by context."""
    cells = grouped([r for r in records if r.status == "ok"], lambda r: (r.context, r.method, r.batch))
    rates = {key: _rates(found) for key, found in cells.items()}
    best: dict[tuple[int, str], int] = {}
    for (context, method, batch), found in rates.items():
        fastest = best.get((context, method))
        if fastest is None or _median(found) > _median(rates[context, method, fastest]):
            best[context, method] = batch
    made, eight_bit = [], eight_bit_reference([r.method for r in records])
    for (context, method), batch in best.items():
        mine, full_batch = rates[context, method, batch], best.get((context, REFERENCE))
        full = {} if full_batch is None else rates[context, REFERENCE, full_batch]
        coded: Rates = {}
        if eight_bit is not None and (context, eight_bit) in best:
            coded = rates[context, eight_bit, best[context, eight_bit]]
        equal = {} if full_batch is None else rates.get((context, method, full_batch), {})
        made.append(
            Gain(
                method,
                context,
                batch,
                _median(mine),
                full_batch,
                _median(full) if full else None,
                paired_ratios(mine, full),
                paired_ratios(equal, full),
                eight_bit,
                paired_ratios(mine, coded),
            )
        )
    return sorted(made, key=lambda gain: gain.context)


# Tokens per second by machine and repeat: what has the same key may be compared.
Rates = dict[Hashable, float]


def _rates(records: Sequence[BenchRecord]) -> Rates:
    return {(r.machine, r.repeat): rate for r in records if (rate := r.tokens_per_s) is not None}


def _median(rates: Rates) -> float:
    found = spread(list(rates.values()))
    assert found is not None
    return found.median


def _row(
    records: list[BenchRecord], full: list[BenchRecord], eight_bit: str | None, coded: list[BenchRecord]
) -> BenchRow:
    good = [r for r in records if r.status == "ok"]
    failed = [r for r in records if r.status != "ok"]
    rates = _rates(good)
    speed = spread(list(rates.values()))
    ratio, eight_bit_ratio = (paired_ratios(rates, _rates(other)) for other in (full, coded))
    steps = distribution([ms for r in good for ms in r.step_ms])
    first = good[0] if good else None
    return BenchRow(
        method=records[0].method,
        context=records[0].context,
        batch=records[0].batch,
        status="ok" if good else failed[-1].status,
        failure=failed[-1].status if failed else None,
        error=failed[-1].error if failed else None,
        repeats=len(good),
        failed=len(failed),
        tokens_per_s=speed and speed.median,
        tokens_per_s_low=speed and speed.low,
        tokens_per_s_high=speed and speed.high,
        ratio=ratio and ratio.median,
        ratio_low=ratio and ratio.low,
        ratio_high=ratio and ratio.high,
        step_ms_p10=steps and steps.p10,
        step_ms_p50=steps and steps.p50,
        step_ms_p90=steps and steps.p90,
        ttft_s=_middle([r.ttft_s for r in good]),
        prefill_s=_middle([r.prefill_s for r in good]),
        build_s=_middle([r.build_s for r in good]),
        kv_device_bytes=None if first is None else first.kv_device_bytes,
        kv_host_bytes=None if first is None else first.kv_host_bytes,
        weights_bytes=None if first is None else first.weights_bytes,
        peak_device_bytes=_largest([r.peak_device_bytes for r in good]),
        peak_host_bytes=_largest([r.peak_host_bytes for r in good]),
        bus_bytes=None if first is None else first.bus_bytes,
        read_bytes=None if first is None else first.read_bytes,
        stacked=None if first is None else first.stacked,
        hit_rate=_middle([r.hit_rate for r in good]),
        eight_bit=eight_bit,
        eight_bit_ratio=eight_bit_ratio and eight_bit_ratio.median,
        eight_bit_ratio_low=eight_bit_ratio and eight_bit_ratio.low,
        eight_bit_ratio_high=eight_bit_ratio and eight_bit_ratio.high,
        kv_ratio=_kv_ratio(good, full),
        eight_bit_kv_ratio=_kv_ratio(good, coded),
    )


def _kv_ratio(mine: Sequence[BenchRecord], theirs: Sequence[BenchRecord]) -> float | None:
    held = [next((r.kv_device_bytes for r in found if r.status == "ok"), 0) for found in (mine, theirs)]
    return held[0] / held[1] if mine and held[1] else None


def _whole(median: float | None, low: float | None, high: float | None) -> Spread | None:
    return None if median is None or low is None or high is None else Spread(median, low, high)


def _middle(values: Sequence[float | None]) -> float | None:
    found = spread([value for value in values if value is not None])
    return found and found.median


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
