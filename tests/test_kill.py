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
DRAWN_KILLS = 6
GRID = [
    *("-m", "full", "-m", "shadowkv:rank=8,budget=64", "-m", "quest:budget=64"),
    *("--lengths", "512,1k,2k", "--depths", "5", "--rounds", "8", "--haystack", "synthetic", "--max-new-tokens", "12"),
]
# Fewer prompts, answered four times each.
DRAWN = [
    *("-m", "full", "-m", "quest:budget=64", "--lengths", "512,1k", "--depths", "3", "--rounds", "8"),
    *("--haystack", "synthetic", "--max-new-tokens", "12", "--temperature", "1.2", "--top-p", "0.95", "--answers", "4"),
]


def start(tiny_folder, out, grid):
    command = [sys.executable, "-m", "cli.main", "eval", "niah", "--model", str(tiny_folder), *grid, "-q"]
    return subprocess.Popen([*command, "--out", str(out)])


def timeless(record):
    """A record without what may differ between two runs: times, and which prefix happened to be there to reuse."""
    return replace(record, prefill_s=0, build_s=0, decode_s=0, reused_tokens=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "more", "kills"),
    [(GRID, [], KILLS), (DRAWN, [], DRAWN_KILLS), (DRAWN, ["--workers", "2"], DRAWN_KILLS)],
    ids=["greedy", "drawn", "drawn by two processes"],
)
def test_kills_change_nothing(tiny_folder, tmp_path, grid, more, kills):
    assert start(tiny_folder, tmp_path / "undisturbed", grid).wait() == 0
    _, expected = read_run(tmp_path / "undisturbed")
    rng, samples = random.Random(0), tmp_path / "killed" / "samples.jsonl"
    killed_at = []
    for _ in range(kills):
        before = samples.stat().st_size if samples.exists() else 0
        process = start(tiny_folder, tmp_path / "killed", [*grid, *more])
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
    assert start(tiny_folder, tmp_path / "killed", [*grid, *more]).wait() == 0
    _, records = read_run(tmp_path / "killed")
    assert len(samples.read_bytes().splitlines()) == len(expected), "nothing lost, nothing doubled"
    assert {r.key: timeless(r) for r in records} == {r.key: timeless(r) for r in expected}
