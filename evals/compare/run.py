"""Two folders in, one comparison out."""

from __future__ import annotations

from pathlib import Path

from evals.bench.records import BenchRecord
from evals.compare.accuracy import compare_answers
from evals.compare.fidelity import compare_forced
from evals.compare.gate import ACCURACY, FIDELITY, MEMORY, THROUGHPUT, Gate
from evals.compare.rows import Comparison
from evals.compare.sides import kind_of, read_manifest, read_side, refuse
from evals.runs.forced.record import ForcedRecord
from evals.runs.results import Record


def compare(baseline: Path, current: Path, gate: Gate) -> Comparison:
    """Compare two run folders without touching them. Raises `SkvError` where they cannot be read or do not compare."""
    before, after = read_manifest("BASELINE", baseline), read_manifest("CURRENT", current)
    kind = kind_of(before, baseline)
    refuse([] if before.benchmark == after.benchmark else [f"benchmark: {before.benchmark} -> {after.benchmark}"])
    measured = {Record: ACCURACY, ForcedRecord: FIDELITY, BenchRecord: THROUGHPUT}
    gate.check((measured[kind], MEMORY))
    if kind is BenchRecord:
        from evals.compare.speed import compare_sweeps  # which measures, and so imports torch

        return compare_sweeps(
            read_side("BASELINE", baseline, before, BenchRecord),
            read_side("CURRENT", current, after, BenchRecord),
            gate,
        )
    if kind is ForcedRecord:
        return compare_forced(
            read_side("BASELINE", baseline, before, ForcedRecord),
            read_side("CURRENT", current, after, ForcedRecord),
            gate,
        )
    return compare_answers(
        read_side("BASELINE", baseline, before, Record), read_side("CURRENT", current, after, Record), gate
    )
