"""The run folder: nothing lost, nothing doubled, nobody else in it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from run_folders import answer

from evals.runs.manifest import Manifest, Session
from evals.runs.results import open_run, read_run
from evals.tables.summary import agreement, summarise
from shadowkv.common.errors import SkvError

RECORD = answer(
    prediction="1234567 \u2028 ünïcode", references=["1234567"], device_bytes=10, host_bytes=20, prompt_sha256="00"
)


def manifest(**changes):
    made = Manifest(
        benchmark="niah",
        config={"seed": 0, "protocol": "magic-number"},
        methods={"full": {}},
        selection={"lengths": [1024]},
        model={"name": "m", "weights_sha256": "abc", "dummy": False},
        sources={},
        notes=[],
        sessions=[Session("skv", "now", {}, None, {"cpu": "x", "torch_threads": 2})],
    )
    return replace(made, **changes)


def record(n, **changes):
    return replace(RECORD, sample=f"depth={n},round=0", **changes)


def test_records_come_back_as_written(tmp_path):
    with open_run(tmp_path, manifest()) as run:
        for n in range(5):
            run.append(record(n))
    with open_run(tmp_path, manifest()) as run:
        assert run.repaired_lines == 0
        assert list(run.records.values()) == [record(n) for n in range(5)]
        assert run.has(record(3).key)
        assert not run.has(record(9).key)
        with pytest.raises(ValueError, match="already answered"):
            run.append(record(3))


@pytest.mark.parametrize("cut", [1, 2, 40, 10**6])
def test_a_torn_last_line_is_repaired_and_counted(tmp_path, cut):
    with open_run(tmp_path, manifest()) as run:
        for n in range(3):
            run.append(record(n))
    path = tmp_path / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    torn = lines[-1][: max(len(lines[-1]) - cut, 1)]
    path.write_bytes(b"".join(lines[:-1]) + torn)
    whole = cut == 1  # only the newline is missing: the record itself is finished, and must not be lost
    with open_run(tmp_path, manifest()) as run:
        assert run.repaired_lines == 1
        assert len(run.records) == (3 if whole else 2)
        if not whole:
            run.append(record(2))
    assert path.read_bytes() == b"".join(lines)


def test_damage_in_the_middle_is_named_not_skipped(tmp_path):
    with open_run(tmp_path, manifest()) as run:
        run.append(record(0))
        run.append(record(1))
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"{nonsense\n" + path.read_bytes())
    with pytest.raises(SkvError, match="line 1 of"), open_run(tmp_path, manifest()):
        pass


def test_a_failed_answer_is_tried_again_and_never_hides_a_scored_one(tmp_path):
    failed = record(0, score=None, status="oom", error="no room")
    with open_run(tmp_path, manifest()) as run:
        run.append(failed)
        assert not run.has(failed.key)
        run.append(record(0))
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes() + json.dumps(asdict(failed)).encode() + b"\n")
    with open_run(tmp_path, manifest()) as run:
        assert run.records[failed.key].score == 1.0


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
    script = (
        "import sys, time; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path; from test_results import manifest; from evals.runs.results import open_run\n"
        "with open_run(Path(sys.argv[1]), manifest()): print('in', flush=True); time.sleep(60)"
    )
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), *paths], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(SkvError, match="another skv process"), open_run(tmp_path, manifest()):
            pass
    finally:
        other.kill()
        other.wait()
    with open_run(tmp_path, manifest()):
        pass  # the lock died with its owner


def test_another_configuration_is_refused_with_what_differs(tmp_path):
    with open_run(tmp_path, manifest()):
        pass
    changed = manifest(
        config={"seed": 7, "protocol": "magic-number"}, model={"name": "m", "weights_sha256": "x", "dummy": False}
    )
    with pytest.raises(SkvError, match=r"model\.weights_sha256: abc -> x; seed: 0 -> 7"), open_run(tmp_path, changed):
        pass
    with pytest.raises(SkvError, match="parameters of full"), open_run(tmp_path, manifest(methods={"full": {"a": 1}})):
        pass


def test_methods_and_lengths_may_be_added(tmp_path):
    with open_run(tmp_path, manifest()):
        pass
    with open_run(tmp_path, manifest(methods={"quest": {"page": 16}}, selection={"lengths": [2048]})):
        pass
    described, _ = read_run(tmp_path)
    assert described.methods == {"full": {}, "quest": {"page": 16}}
    assert len(described.sessions) == 2


def test_unwritable_places_are_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SkvError, match="cannot write to"), open_run(tmp_path / "file" / "run", manifest()):
        pass


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    with open_run(tmp_path, manifest()) as run:
        run.append(record(0))
        real = os.write

        def full(file, data):
            real(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(SkvError, match="No space left"):
            run.append(record(1))
        monkeypatch.undo()
    with open_run(tmp_path, manifest()) as run:
        assert run.repaired_lines == 1
        assert list(run.records.values()) == [record(0)]


def test_unscored_answers_are_counted_and_left_out_of_the_mean():
    rows = summarise(
        [
            record(0),
            record(1, score=0.0),
            record(2, score=None, status="oom"),
            record(0, method="quest", score=None, status="error"),
        ]
    )
    assert [(r.method, r.score, r.scored, r.total) for r in rows] == [("full", 0.5, 2, 3), ("quest", None, 0, 1)]


@pytest.mark.parametrize(
    ("tokens", "reference", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([9, 2, 3], [1, 2, 3], 1.0),  # the first token is dense under every method and does not count
        ([1, 2], [1, 2, 3], 0.5),
        ([1, 2, 3, 4, 5], [1, 2, 3], 1.0),
        ([1, 3, 2], [1, 2, 3], 0.0),
        ([1], [1], None),
    ],
)
def test_agreement_is_over_the_references_tokens_from_the_second_on(tokens, reference, expected):
    assert agreement(tokens, reference) == expected


def test_run_json_is_plain_json_and_reads_back(tmp_path):
    with open_run(tmp_path, manifest()):
        pass
    raw = json.loads((tmp_path / "run.json").read_text())
    assert raw == asdict(manifest())
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SkvError, match=r"not a run\.json"):
        read_run(tmp_path)
