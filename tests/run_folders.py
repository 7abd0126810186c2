"""Run folders whose every number is known, written as runs write them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evals.bench.records import BenchRecord
from evals.runs.manifest import Manifest, Session
from evals.runs.results import Record

METHODS = ("full", "quest:budget=64", "shadowkv:budget=64,rank=8")
NOTE = "dummy weights: scores mean nothing, only times and bytes do"
MODEL = {
    "name": "m",
    "source": "folder m",
    "weights_sha256": "abc",
    "dummy": False,
    "dtype": "float32",
    "device": "cpu",
}
MACHINE = {"platform": "Linux", "cpu": "a CPU", "cores": 2, "memory_bytes": 1, "torch_threads": 2, "gpu": None}
SESSION = Session("skv eval niah --model m", "2026-01-02T03:04:05+00:00", {"python": "3.11"}, None, MACHINE)


def manifest(benchmark: str = "niah", **changes: Any) -> Manifest:
    made = Manifest(
        benchmark=benchmark,
        config={"seed": 0},
        methods={label: {} for label in METHODS},
        selection={},
        model=dict(MODEL),
        sources={"haystack": {"name": "essays", "sha256": "def"}},
        notes=[],
        sessions=[SESSION],
    )
    return replace(made, **changes)


def dummy(**changes: Any) -> Manifest:
    return manifest(model={**MODEL, "dummy": True}, notes=[NOTE], **changes)


def answer(method: str = "full", sample: int = 0, score: float | None = 1.0, **changes: Any) -> Record:
    made = Record(
        benchmark="niah",
        task="magic-number",
        length=1024,
        sample=f"depth={sample},round=0",
        method=method,
        score=score,
        status="ok" if score is not None else "oom",
        error=None if score is not None else "out of memory",
        prediction=f" {1000 + sample}.",
        references=[str(1000 + sample)],
        prompt_tokens=1000,
        reused_tokens=0,
        new_tokens=3,
        tokens=[5, 6, 7],
        stopped=True,
        prefill_s=1.0,
        build_s=0.1,
        decode_s=0.3,
        device_bytes=2**20 if method == "full" else 2**18,
        host_bytes=0,
        prompt_sha256=f"{sample:02d}",
        meta={"depth": float(sample), "round": 0, "max_new_tokens": 16},
        attended_tokens=64.0,
        bus_bytes=0,
        prompt_tail=f"what is the number of text {sample}?",
    )
    return replace(made, **changes)


def grid(methods: Iterable[str] = METHODS, lengths: Iterable[int] = (1024, 2048), samples: int = 4) -> list[Record]:
    """Full attention right everywhere, the others in every second answer."""
    return [
        answer(method, n, 1.0 if method == "full" or n % 2 else 0.0, length=length,
               prompt_sha256=f"{length}-{n}", tokens=[5, 6, 7] if method == "full" or n % 2 else [5, 9])
        for length in lengths for n in range(samples) for method in methods
    ]  # fmt: skip


def measurements() -> list[BenchRecord]:
    return [
        BenchRecord(method, 1024, batch, repeat, "ok", None, "here", "now", step_ms=[ms * batch] * 2,
                    ttft_s=1.0, prefill_s=1.0, build_s=0.1, weights_bytes=2**20, kv_device_bytes=2**20, conditions={})
        for method, ms in (("full", 10.0), ("quest:budget=64", 8.0)) for batch in (1, 2) for repeat in (0, 1)
    ]  # fmt: skip


def write_run(folder: Path, records: Iterable[Any], described: Manifest | None = None) -> Path:
    """A whole run folder: run.json, and a line per record in the file of their kind."""
    folder.mkdir(parents=True, exist_ok=True)
    records = list(records)
    (described or manifest()).write(folder / "run.json")
    lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    (folder / records[0].FILE).write_text(lines, encoding="utf-8")
    return folder
