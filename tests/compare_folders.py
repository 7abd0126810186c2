"""Run folders with a known truth, written as `skv eval` and `skv bench` would write them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from test_results import RECORD, manifest

from evals.bench.records import BenchRecord
from evals.runs.results import Record

MODEL = {"name": "m", "weights_sha256": "abc", "dummy": False, "dtype": "float32", "device": "cpu"}


def answer(n: int, score: float | None, method: str = "full", **changes: Any) -> Record:
    """Answer `n` of a method; its text says whether it is right, so that a changed score is a changed text."""
    known = {"status": "ok" if score is not None else "error", "prediction": f"answer {score}", "method": method}
    asked = {"sample": f"depth={n},round=0", "prompt_sha256": f"{n:064x}"}
    return replace(RECORD, score=score, **{**known, **asked, **changes})


def answers(scores: list[float | None], method: str = "full", **changes: Any) -> list[Record]:
    """One answer per score."""
    return [answer(n, score, method, **changes) for n, score in enumerate(scores)]


def run_folder(path: Path, records: list[Record], **changes: Any) -> Path:
    """An accuracy run of these answers."""
    methods = {record.method: {} for record in records}
    described = manifest(**{"methods": methods, "selection": {"lengths": [1024]}, "model": MODEL, **changes})
    return _written(path, asdict(described), "samples.jsonl", records)


def measurement(method: str, repeat: int, tokens_per_s: float, **changes: Any) -> BenchRecord:
    """One repeat at 1k x 1 whose steps take what this speed says."""
    known = {"context": 1024, "batch": 1, "status": "ok", "error": None, "machine": "box", "started": "now"}
    sizes = {"kv_device_bytes": 2**20, "kv_host_bytes": 0, "step_ms": [1000 / tokens_per_s] * 4}
    return BenchRecord(**{"method": method, "repeat": repeat, **known, **sizes, **changes})


def sweep_folder(path: Path, records: list[BenchRecord], **changes: Any) -> Path:
    """A sweep of these measurements."""
    config = {"seed": 0, "machine": "box", "synthetic_kv": False}
    methods = {record.method: {} for record in records}
    selection = {"contexts": [1024], "batches": [1]}
    known = {"benchmark": "throughput", "config": config, "model": MODEL, "methods": methods, "selection": selection}
    return _written(path, asdict(manifest(**{**known, **changes})), "throughput.jsonl", records)


def _written(path: Path, described: dict[str, Any], file: str, records: list[Any]) -> Path:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(described))
    (path / file).write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    return path
