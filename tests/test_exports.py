"""Exports: the same figures in the formats of other tools."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pandas as pd
import pytest
from run_folders import METHODS, NOTE, dummy, grid, manifest, measurements, write_run

from cli.main import main

KINDS = {  # of lm_eval/result_schema.py, 0.4.13
    "results": dict, "groups": dict, "group_subtasks": dict, "configs": dict, "versions": dict, "n-shot": dict,
    "higher_is_better": dict, "n-samples": dict, "config": dict, "git_hash": str, "date": float,
    "transformers_version": str, "model_source": str, "model_name": str, "model_name_sanitized": str,
}  # fmt: skip


def exported(run, *names):
    assert main(["report", str(run), *(f"--export={name}" for name in names)]) == 0
    return {path.parent.name: json.loads(path.read_text()) for path in run.rglob("results_*.json")}


@pytest.fixture
def records():
    answers = [replace(r, benchmark="ruler", task=task) for task in ("vt", "qa_1") for r in grid()]
    answers[1] = replace(answers[1], score=None, status="oom", error="out of memory")  # vt 1024 sample 0 of quest
    return answers


def test_lm_eval_has_the_harness_schema_and_our_figures(tmp_path, records):
    found = exported(write_run(tmp_path / "run", records, manifest("ruler")), "lm-eval")
    assert set(found) == {"full", "quest_budget=64", "shadowkv_budget=64_rank=8"}
    told = found["quest_budget=64"]
    for name, kind in KINDS.items():
        assert isinstance(told[name], kind), name
    tasks = {f"skv_ruler_{task}_{length}" for task in ("vt", "qa_1") for length in (1024, 2048)}
    for name in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert set(told[name]) == tasks, name
    result = told["results"]["skv_ruler_qa_1_1024"]
    assert result == {
        "alias": "skv_ruler_qa_1_1024", "sample_len": 4, "score,none": 0.5,
        "score_stderr,none": pytest.approx(math.sqrt(1 / 3) / 2),
    }  # fmt: skip
    assert told["n-samples"]["skv_ruler_qa_1_1024"] == {"original": 4, "effective": 4}
    assert told["n-samples"]["skv_ruler_vt_1024"] == {"original": 4, "effective": 3}
    assert told["results"]["skv_ruler_vt_1024"]["score,none"] == pytest.approx(2 / 3)
    assert told["groups"]["skv_ruler_1024"]["score,none"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert sorted(told["group_subtasks"]["skv_ruler_1024"]) == ["skv_ruler_qa_1_1024", "skv_ruler_vt_1024"]
    assert told["config"]["model_args"] == {"pretrained": "m", "method": "quest:budget=64"}
    assert told["date"] == 1767323045.0


def test_lm_eval_gives_no_figure_where_nothing_is_scored(tmp_path, records):
    failed = [replace(r, score=None, status="oom") if r.task == "vt" else r for r in records]
    told = exported(write_run(tmp_path / "run", failed, manifest("ruler")), "lm-eval")["full"]
    assert told["results"]["skv_ruler_vt_1024"] == {"alias": "skv_ruler_vt_1024", "sample_len": 4}
    assert "score,none" not in told["groups"]["skv_ruler_1024"]


def test_lm_eval_says_dummy_and_spells_infinity(tmp_path):
    described = dummy(methods={"full": {}, METHODS[1]: {"alpha": float("inf")}, METHODS[2]: {}})
    found = exported(write_run(tmp_path / "run", grid(), described), "lm-eval")
    assert all(NOTE in told["skv_notes"] and "[dummy weights]" in told["skv_notes"] for told in found.values())
    assert found["quest_budget=64"]["config"]["model_args"]["alpha"] == "inf"


def test_parquet_holds_every_record(tmp_path, records):
    described = replace(dummy(), benchmark="ruler")
    run = write_run(tmp_path / "run", records, described)
    exported(run, "parquet")
    frame = pd.read_parquet(run / "samples.parquet")
    assert len(frame) == len(records)
    assert set(frame["notes"]) == {NOTE}
    assert set(frame["marks"]) == {"[dummy weights]"}
    for record, (_, row) in zip(records, frame.iterrows(), strict=True):
        for name, value in asdict(record).items():
            kept = json.loads(row[name]) if name == "meta" else row[name]
            kept = list(kept) if isinstance(value, list) else kept
            assert kept == value or (value is None and pd.isna(kept)), name


def test_parquet_has_a_file_for_each_kind_of_run(tmp_path):
    runs = [
        write_run(tmp_path / "a", grid()),
        write_run(tmp_path / "b", grid(["full"])),
        write_run(tmp_path / "c", measurements(), manifest("throughput")),
    ]
    out = tmp_path / "out"
    assert main(["report", *map(str, runs), "--out", str(out), "--export", "parquet", "--export", "lm-eval"]) == 0
    assert set(pd.read_parquet(out / "samples.parquet")["run"]) == {"a", "b"}
    assert len(pd.read_parquet(out / "throughput.parquet")) == 8
    assert {path.name for path in (out / "lm-eval").iterdir()} == {"a", "b"}
