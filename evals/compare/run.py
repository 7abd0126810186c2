"""Two folders in, one comparison out."""

from __future__ import annotations

from pathlib import Path

from evals.bench.records import BenchRecord
from evals.compare.accuracy import compare_answers
from evals.compare.gate import ACCURACY, MEMORY, THROUGHPUT, Gate
from evals.compare.rows import Comparison
from evals.compare.sides import kind_of, read_manifest, read_side, refuse
from evals.runs.results import Record


def compare(baseline: Path, current: Path, gate: Gate) -> Comparison:
    """Compare two run folders without touching them. Raises `SkvError` where they cannot be read or do not compare."""
    before, after = read_manifest("BASELINE", baseline), read_manifest("CURRENT", current)
    kind = kind_of(before, baseline)
    refuse([] if before.benchmark == after.benchmark else [f"benchmark: {before.benchmark} -> {after.benchmark}"])
    gate.check((THROUGHPUT if kind is BenchRecord else ACCURACY, MEMORY))
    if kind is BenchRecord:
        from evals.compare.speed import compare_sweeps  # which measures, and so imports torch

        return compare_sweeps(
            read_side("BASELINE", baseline, before, BenchRecord),
            read_side("CURRENT", current, after, BenchRecord),
            gate,
        )
    return compare_answers(
        read_side("BASELINE", baseline, before, Record), read_side("CURRENT", current, after, Record), gate
    )
