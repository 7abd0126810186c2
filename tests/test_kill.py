"""kill -9 at any moment: what was finished stays, and the completed run equals an undisturbed one."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from evals.runs.results import read_run

KILLS = 20
GRID = [
    *("-m", "full", "-m", "shadowkv:rank=8,budget=64", "-m", "quest:budget=64"),
    *("--lengths", "512,1k,2k", "--depths", "5", "--rounds", "8", "--haystack", "synthetic", "--max-new-tokens", "12"),
]


def start(tiny_folder, out):
    command = [sys.executable, "-m", "cli.main", "eval", "niah", "--model", str(tiny_folder), *GRID, "-q"]
    return subprocess.Popen([*command, "--out", str(out)])


def timeless(record):
    """A record without what may differ between two runs: times, and which prefix happened to be there to reuse."""
    return replace(record, prefill_s=0, build_s=0, decode_s=0, reused_tokens=0)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tiny_folder, tmp_path):
    assert start(tiny_folder, tmp_path / "undisturbed").wait() == 0
    _, expected = read_run(tmp_path / "undisturbed")
    rng, samples = random.Random(0), tmp_path / "killed" / "samples.jsonl"
    killed_at = []
    for _ in range(KILLS):
        before = samples.stat().st_size if samples.exists() else 0
        process = start(tiny_folder, tmp_path / "killed")
        # Wait until it works again, then strike after a random while, most often between or amid its writes.
        while process.poll() is None and (samples.stat().st_size if samples.exists() else 0) <= before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.wait()
        killed_at.append(len(samples.read_bytes().splitlines()))
    assert killed_at[-1] < len(expected), "all kills must come before the run is complete"
    # A process killed amid a write leaves part of a line; make sure that this case is among those tried.
    samples.write_bytes(samples.read_bytes()[:-100])
    assert start(tiny_folder, tmp_path / "killed").wait() == 0
    _, records = read_run(tmp_path / "killed")
    assert len(samples.read_bytes().splitlines()) == len(expected), "nothing lost, nothing doubled"
    assert {r.key: timeless(r) for r in records} == {r.key: timeless(r) for r in expected}
