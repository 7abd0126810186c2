"""All records of several runs as one Parquet file for each kind, with a column that says which run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals.common.grouping import grouped
from evals.reporting.folders import Run

_AS_JSON = ("meta", "conditions", "parts_ms")  # mappings whose keys differ from run to run


def write_parquet(runs: Sequence[Run], folder: Path) -> list[Path]:
    """samples.parquet, throughput.parquet or latency.parquet: one row per record, notes and marks in every row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = []
    for name, alike in grouped(runs, lambda run: type(run.records[0]).FILE).items():
        rows = [_row(run, record) for run in alike for record in run.records]
        made.append(folder / Path(name).with_suffix(".parquet"))
        pq.write_table(pa.Table.from_pylist(rows), made[-1])
    return made


def _row(run: Run, record: Any) -> dict[str, Any]:
    fields = {
        key: json.dumps(value, ensure_ascii=False) if key in _AS_JSON else value
        for key, value in asdict(record).items()
    }
    manifest = run.manifest
    own = {"run": run.name, "model": manifest.model["name"], "dummy": manifest.model["dummy"]}
    return {**own, "marks": " ".join(manifest.marks), "notes": "; ".join(manifest.notes), **fields}
