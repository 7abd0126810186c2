"""Tables and plots of a sweep, and what a reader must know beside them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evals.bench.conditions import noise_note
from evals.bench.records import BenchRecord
from evals.bench.throughput.plots import write_gain_bars, write_memory_bars, write_throughput
from evals.bench.throughput.summary import BenchRow, Gain
from evals.bench.timing import Spread
from evals.common.grouping import grouped
from evals.runs.manifest import Manifest
from evals.tables.summary import REFERENCE
from evals.tables.table import Table, mib, number, percent, tokens

if TYPE_CHECKING:
    import pandas as pd

_CAPTION = (
    "Tokens/s: of all rows while decoding, prefill excluded; median over repeats, and half of what lies between the "
    "lowest and the highest. x full: to full attention at the same batch, measured side by side in every repeat, "
    "(lowest-highest). TTFT: of a prompt that waits for no other, timed once for all methods; of full@hf, of the whole "
    "batch. Hits: of the chunks that a step chose, those there since the step before, over 8 steps beyond those "
    "timed. Bus: between host and device per step; read: what a step has to read of the device's memory; both as skv "
    "plan counted them when they were recorded, over the median step. Peak: of the device's allocator, on a CPU of the "
    "whole process."
)

# Of a row, empty where full attention did not run in 8 bits.
_EIGHT_BIT_FIELDS = (
    "eight_bit", "eight_bit_ratio", "eight_bit_ratio_low", "eight_bit_ratio_high", "kv_ratio", "eight_bit_kv_ratio",
)  # fmt: skip
_EIGHT_BIT = " The second ratio, and KV x, are the same to full attention in 8 bits, and of device KV."


class _Column(NamedTuple):
    head: str
    cell: Callable[[BenchRow], str]
    dense: bool | None = None  # shown only where space is scarce (True) or plenty (False)
    shown: Callable[[Sequence[BenchRow]], bool] = lambda rows: True


def _rate(row: BenchRow) -> str:
    found = row.throughput
    return "–" if found is None else f"{found.median:.2f} ±{100 * found.relative:.0f}%"


def ratio(found: Spread | None) -> str:
    """A ratio with its lowest and highest."""
    return "–" if found is None else f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})"


def _steps(row: BenchRow) -> str:
    return "/".join(number(x, ".1f") for x in (row.step_ms_p10, row.step_ms_p50, row.step_ms_p90))


def _gb_per_s(value: float | None) -> str:
    return "–" if not value else f"{value / 1e9:.2f}"


def _any_hits(rows: Sequence[BenchRow]) -> bool:
    return any(row.hit_rate is not None for row in rows)


_COLUMNS = (
    _Column("context", lambda row: tokens(row.context)),
    _Column("method", lambda row: row.method),
    _Column("batch", lambda row: str(row.batch)),
    _Column("status", lambda row: {"oom": "OOM"}.get(row.status, row.status), dense=False),
    _Column("tokens/s", lambda row: _rate(row) if row.status == "ok" else row.status.upper()),
    _Column("x full", lambda row: ratio(row.over_full)),
    _Column("ms/token\np10/p50/p90", _steps, dense=False),
    _Column("ms/token\np50", lambda row: number(row.step_ms_p50, ".1f"), dense=True),
    _Column("TTFT\ns", lambda row: number(row.ttft_s, ".2f")),
    _Column("build\ns", lambda row: number(row.build_s, ".3f"), dense=False),
    _Column("device\nKV MiB", lambda row: mib(row.kv_device_bytes)),
    _Column("host\nKV MiB", lambda row: mib(row.kv_host_bytes)),
    _Column("peak MiB", lambda row: mib(row.peak_device_bytes or row.peak_host_bytes), dense=False),
    _Column("hits\n%", lambda row: percent(row.hit_rate), shown=_any_hits),
    _Column("bus MiB\n/step", lambda row: mib(row.bus_bytes), dense=False),
    _Column("bus\nGB/s", lambda row: _gb_per_s(row.bus_bytes_per_s), dense=False),
    _Column("read\nGB/s", lambda row: _gb_per_s(row.read_bytes_per_s), dense=False),
)


def _columns(rows: Sequence[BenchRow]) -> list[_Column]:
    """Those of every sweep and, where full attention ran in 8 bits too, ratios to it and of memory."""
    eight_bit = _eight_bit(rows)
    if eight_bit is None:
        return list(_COLUMNS)
    kv = [
        _Column(f"KV\nx {REFERENCE}", lambda row: number(row.kv_ratio, ".2f"), dense=False),
        _Column(f"KV\nx {eight_bit}", lambda row: number(row.eight_bit_kv_ratio, ".2f"), dense=False),
    ]
    after = {
        f"x {REFERENCE}": [_Column(f"x {eight_bit}", lambda row: ratio(row.over_eight_bit))],
        "host\nKV MiB": kv,
    }
    return [one for column in _COLUMNS for one in (column, *after.get(column.head, ()))]


def _eight_bit(rows: Sequence[BenchRow] | Sequence[Gain]) -> str | None:
    return next((row.eight_bit for row in rows if row.eight_bit), None)


def throughput_table(title: str, rows: Sequence[BenchRow], *, dense: bool = False) -> Table:
    """One line per method, context and batch; the dense one has fewer columns."""
    shown = [column for column in _columns(rows) if column.dense in (None, dense) and column.shown(rows)]
    lines = [[column.cell(row) for column in shown] for row in rows]
    caption = _CAPTION + (_EIGHT_BIT if _eight_bit(rows) else "")
    return Table(title, [column.head for column in shown], lines, caption, names=2)


def gain_table(found: Sequence[Gain]) -> Table:
    """The form of the ShadowKV paper's table: each method at its own best batch against full attention at its own."""

    def at(rate: float | None, batch: int | None) -> str:
        return "–" if rate is None else f"{rate:.2f} ({batch})"

    eight_bit = _eight_bit(found)
    lines = [
        [
            tokens(gain.context),
            gain.method,
            at(gain.full_tokens_per_s, gain.full_batch),
            at(gain.tokens_per_s, gain.batch),
            ratio(gain.gain),
            ratio(gain.gain_equal),
            *([ratio(gain.eight_bit_gain)] if eight_bit else []),
        ]
        for gain in found
    ]
    columns = ["context", "method", "full\ntokens/s (batch)", "tokens/s\n(batch)", "gain", "gain at\nfull's batch"]
    columns += [f"gain over\n{eight_bit}"] if eight_bit else []
    caption = (
        "Each at the batch, of those measured, that decodes most tokens per second. Gain: median (lowest-highest)."
    )
    return Table("Best batch", columns, lines, caption, names=2)


def notes_of(manifest: Manifest, records: Sequence[BenchRecord], rows: Sequence[BenchRow]) -> list[str]:
    """What every table of this sweep must say, from the settings and from what was measured."""
    notes = list(manifest.notes)
    machines = list(dict.fromkeys(record.machine for record in records))
    if len(machines) > 1:
        notes.append(f"measured on several machines, between which there are no ratios: {'; '.join(machines)}")
    later = _of_other_commands(manifest, records)
    if later:
        notes.append(f"not measured side by side, full attention being of another command in part: {', '.join(later)}")
    notes += _of_builds(records)
    apart = list(dict.fromkeys(row.method for row in rows if row.stacked is False))
    if apart:
        notes.append(f"rows run one after the other: {', '.join(apart)}")
    twins = list(dict.fromkeys(row.method for row in rows if "engine=fast" in row.method))
    if twins and manifest.model.get("device") == "cpu":
        notes.append(f"in plain torch, on a CPU, so that times say nothing of the kernels: {', '.join(twins)}")
    streamed = list(dict.fromkeys(f"{tokens(r.context)} x {r.batch}" for r in records if r.streamed_rows))
    if streamed:
        notes.append(
            "prompts that the host had no room to keep were computed straight into caches, whose building is in TTFT "
            f"where it was so of a whole batch: {', '.join(streamed)}"
        )
    for row in rows:
        if row.failed:
            some = f", in {row.failed} of {row.failed + row.repeats} repeats" if row.repeats else ""
            notes.append(f"{row.failure}: {row.method} @ {tokens(row.context)} x {row.batch}{some}: {row.error}")
    selection, config = manifest.selection, manifest.config
    if selection.get("find_max"):
        notes.append("repeat 0 of a largest batch is from the search for it, in which methods do not take turns")
        top = [row for row in rows if row.status == "ok" and row.batch >= selection["max_batch"]]
        notes += [f"the search ended at --max-batch {row.batch}: {row.method} @ {tokens(row.context)}" for row in top]
    before = [record.conditions["before"] for record in records if "before" in record.conditions]
    notes.append(
        f"warm: {config.get('warmup_steps', '?')} steps before the {config.get('steps', '?')} that count, a short "
        f"prompt before them; {selection.get('repeats', '?')} repeats, methods taking turns; noise before each: "
        f"{noise_note(before)}"
    )
    return notes


def _of_other_commands(manifest: Manifest, records: Sequence[BenchRecord]) -> list[str]:
    """Methods that some context was measured with by other commands than full attention, hence at another time."""
    starts = sorted(session.started for session in manifest.sessions)
    good = grouped([record for record in records if record.status == "ok"], lambda r: (r.context, r.method))
    by = {key: {bisect_right(starts, record.started) for record in found} for key, found in good.items()}
    return list(
        dict.fromkeys(key[1] for key, commands in by.items() if commands != by.get((key[0], REFERENCE), commands))
    )


def _of_builds(records: Sequence[BenchRecord]) -> list[str]:
    """What it means that a batch is built once: rows grow from repeat to repeat, and not all methods take turns."""
    notes = []
    longest = max((r for r in records if r.decoded_before), key=lambda r: r.decoded_before / r.context, default=None)
    if longest is not None:
        share = percent(longest.decoded_before / longest.context)
        notes.append(
            "batches are built once and decode on from repeat to repeat, so that rows began one with up to "
            f"{longest.decoded_before} tokens more than their context ({share} %)"
        )
    alone = [r for r in records if r.turns is not None and REFERENCE not in r.turns]
    if alone:
        said = dict.fromkeys(f"{r.method} @ {tokens(r.context)} x {r.batch}" for r in alone)
        notes.append(f"not turn by turn with full attention, their batches not fitting at once: {', '.join(said)}")
    return notes


def bench_frame(manifest: Manifest, rows: Sequence[BenchRow], notes: Sequence[str]) -> pd.DataFrame:
    """What the table shows, unrounded; every line says whether weights or keys were made up."""
    import pandas as pd

    synthetic = bool(manifest.config.get("synthetic_kv"))
    marks = {"dummy": manifest.model["dummy"], "synthetic_kv": synthetic, "notes": "; ".join(notes)}
    frame = pd.DataFrame([asdict(row) | marks for row in rows])
    return frame if _eight_bit(rows) else frame.drop(columns=list(_EIGHT_BIT_FIELDS))


def write_bench_plots(folder: Path, rows: Sequence[BenchRow], found: Sequence[Gain], title: str) -> list[Path]:
    """Throughput, gains and memory; nothing if nothing could be measured."""
    if not any(row.status == "ok" for row in rows):
        return []
    made = [write_throughput(folder / "throughput.png", rows, title)]
    if any(gain.method != REFERENCE and gain.gain for gain in found):
        made.append(write_gain_bars(folder / "gain.png", found, title))
    return [*made, write_memory_bars(folder / "memory.png", rows, found, title)]
