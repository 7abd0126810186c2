"""Tables of kernels, always rebuildable from run.json, kernels.jsonl and compiled.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evals.bench.conditions import noise_note
from evals.bench.kernels.kernels import KernelRecord
from evals.runs.manifest import Manifest
from evals.tables.table import Table, number, percent
from shadowkv.kernels.backend import CompiledKernel

COMPILED_FILE = "compiled.jsonl"
_CHECKED = (
    "Error: the largest difference to the plain-torch twin over the largest magnitude (of whole numbers, the share "
    "that differs; of low_rank.fit, by how much its error exceeds that of torch.linalg.svd or, of "
    "a row too long for it, of eigenvectors in fp64)."
)
_TIMED = (
    "Times: by the GPU's clock, as a CUDA graph, the cache flushed before each; below 0.1 ms, of which launching a "
    "graph is a part, those of a graph of ten calls, each behind a flush, less the median of flushes alone, by ten; of "
    "a staged copy, low_rank.fit and torch.linalg.svd, which wait for the device or the host, by the host's clock. "
    "GB/s: of the fewest bytes that the result can be had with, as a share of a copy on the device or, from host "
    "memory, of one from pinned memory. TFLOP/s: as a share of a square product in the same type. All rates are of the "
    "same run. x kernel: time of another way over the kernel's. % of fastest: speed over that of the fastest way "
    "measured."
)
_NO_TIMES = "No times: they need a GPU."


@dataclass(frozen=True)
class KernelReport:
    """What was found, and the tables made of it."""

    records: list[KernelRecord]
    compiled: list[CompiledKernel]
    tables: list[Table]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        rows = [
            asdict(record)
            | {
                "times_ms": record.times._asdict() if record.times else None,
                "bytes_per_s": record.bytes_per_s,
                "share_of_bytes": record.share_of_bytes,
                "flop_per_s": record.flop_per_s,
                "share_of_flop": record.share_of_flop,
            }
            for record in self.records
        ]
        return {"rows": rows, "compiled": [asdict(each) for each in self.compiled], "notes": self.notes}


class _Column(NamedTuple):
    head: str
    cell: Callable[[KernelRecord], str]
    timed: bool = False


def _times(record: KernelRecord) -> str:
    times = record.times
    return "–" if times is None else "/".join(f"{1000 * ms:.4g}" for ms in times)


def _rate(value: float | None, unit: float) -> str:
    return number(None if value is None else value / unit, ".1f")


_COLUMNS = (
    _Column("kernel", lambda r: r.kernel),
    _Column("variant", lambda r: r.variant),
    _Column("way", lambda r: r.way),
    _Column("result", lambda r: {"oom": "OOM", "wrong": "WRONG"}.get(r.status, r.status)),
    _Column("error", lambda r: number(r.relative_error, ".1e")),
    _Column("bound", lambda r: number(r.bound, ".0e")),
    _Column("us\np10/p50/p90", _times, timed=True),
    _Column("GB/s", lambda r: _rate(r.bytes_per_s, 1e9), timed=True),
    _Column("% of\ncopy", lambda r: percent(r.share_of_bytes, 0), timed=True),
    _Column("TFLOP/s", lambda r: _rate(r.flop_per_s, 1e12), timed=True),
    _Column("% of\nproduct", lambda r: percent(r.share_of_flop, 0), timed=True),
)


def kernel_table(title: str, records: Sequence[KernelRecord]) -> Table:
    """One line per kernel, variant and way; times only where there are any."""
    timed = any(record.ms for record in records)
    columns = [column for column in _COLUMNS if timed or not column.timed]
    lines = [[column.cell(record) for column in columns] for record in records]
    heads = [column.head for column in columns]
    if timed:
        heads += ["x kernel", "% of\nfastest"]
        for line, record in zip(lines, records, strict=True):
            line += [number(_of_kernel(record, records), ".2f"), percent(_of_fastest(record, records), 0)]
    return Table(title, heads, lines, f"{_CHECKED} {_TIMED if timed else _NO_TIMES}", names=4)


def _of_kernel(record: KernelRecord, records: Sequence[KernelRecord]) -> float | None:
    """How many times the kernel's time another way to its result takes; None of kernels."""
    kernel = next(r for r in records if (r.kernel, r.variant) == (record.kernel, record.variant))
    if kernel is record or not (kernel.times and record.times):
        return None
    return record.times.p50 / kernel.times.p50


def _of_fastest(record: KernelRecord, records: Sequence[KernelRecord]) -> float | None:
    """Which share of the speed of the fastest way measured this one has; None where there is one way only."""
    times = [r.times.p50 for r in records if (r.kernel, r.variant) == (record.kernel, record.variant) and r.times]
    return min(times) / record.times.p50 if record.times and len(times) > 1 else None


def compiled_table(compiled: Sequence[CompiledKernel]) -> Table:
    """One line per variant and target."""
    lines = [
        [
            c.kernel,
            c.variant,
            c.target,
            *map(str, (c.registers, c.stack_bytes, c.shared_bytes)),
            number(c.narrow_loads, "d"),
        ]
        for c in compiled
    ]
    columns = ["kernel", "variant", "target", "registers\nper thread", "stack bytes\nper thread", "shared\nbytes"]
    columns.append("narrow\nloads")
    caption = (
        "Compiled, not run. Of the geometry only the head size counts, as a power of two; other sizes are in the "
        "variant. Stack is where a thread's registers go that there are too few of: 0 is none spilled. Narrow loads: "
        "instructions by which a thread reads less than 4 bytes of global memory."
    )
    return Table("Compiled kernels", columns, lines, caption, names=3)


def report_of(manifest: Manifest, found: Iterable[KernelRecord], compiled: Sequence[CompiledKernel]) -> KernelReport:
    """Tables and notes of what was found."""
    records, said = list(found), list(manifest.notes)
    said += [f"{r.status}: {' '.join(filter(None, r.key))}: {r.error}" for r in records if r.status != "ok"]
    said += _fastest(records)
    timed = [r for r in records if r.ms]
    if timed:
        said.append(f"reached here: {_reached(timed)}")
        said.append(f"noise before each: {noise_note([r.conditions['before'] for r in timed])}")
    tables = [kernel_table(manifest.title, records), *([compiled_table(compiled)] if compiled else [])]
    return KernelReport(records, list(compiled), tables, said)


def _reached(timed: Sequence[KernelRecord]) -> str:
    """The rates that shares are of. A folder that was continued may hold several of each."""
    paths = (("copy on the device", False), ("copy from pinned memory", True))
    rates = {
        name: [r.peak_bytes_per_s / 1e9 for r in timed if r.over_link == over_link and r.peak_bytes_per_s]
        for name, over_link in paths
    }
    products = [r.peak_flop_per_s / 1e12 for r in timed if r.peak_flop_per_s]
    said = [f"{name} {_range(found)} GB/s" for name, found in rates.items() if found]
    return ", ".join([*said, *([f"square product {_range(products)} TFLOP/s"] if products else [])])


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.4g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _fastest(records: Sequence[KernelRecord]) -> list[str]:
    """Which way to each result won, where several were timed, and what the first, the kernel, has of its speed."""
    by_subject: dict[tuple[str, str], list[KernelRecord]] = {}
    for record in records:
        by_subject.setdefault((record.kernel, record.variant), []).append(record)
    said = []
    for subject, ways in by_subject.items():
        timed = [(record.times.p50, record.way) for record in ways if record.times]
        if len(timed) < 2:
            continue
        share, own = _of_fastest(ways[0], ways), ways[0].way
        behind = "" if share is None or share == 1 else f"; {own} has {percent(share, 0)} % of its speed"
        said.append(f"{', '.join(filter(None, subject))}: {min(timed)[1]} is the fastest way measured{behind}")
    return said


def read_compiled(folder: Path) -> list[CompiledKernel]:
    """What an earlier command compiled, if any did."""
    file = folder / COMPILED_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [CompiledKernel(**json.loads(line)) for line in lines]


def write_compiled(folder: Path, compiled: Sequence[CompiledKernel]) -> None:
    """In place of what an earlier command compiled."""
    lines = "".join(json.dumps(asdict(each)) + "\n" for each in compiled)
    (folder / COMPILED_FILE).write_text(lines, encoding="utf-8")
