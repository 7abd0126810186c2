"""A GPU machine without network: an image with torch, transformers, triton and pytest, and two wheels brought along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABSENT = ["gguf", "datasets", "itables", "rouge", "selenium", "jieba", "fuzzywuzzy", "hypothesis", "peft", "xdist"]


def python(code, *arguments):
    """What a process says in which none of ABSENT can be imported."""
    hidden = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); {code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", hidden, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sweep_with_made_up_keys_is_run_to_its_tables(tiny_folder, tmp_path):
    pytest.importorskip("matplotlib")
    python(
        "from cli.main import run; run()",
        *("bench", "throughput", "--model", tiny_folder, "--dummy", "--synthetic-kv", "--context", "300"),
        *("--batch", "1", "--repeats", "1", "--steps", "2", "--warmup", "1", "-m", "full", "--out", tmp_path / "run"),
    )
    assert (tmp_path / "run" / "summary.md").is_file()


def test_what_needs_a_gpu_is_collected():
    said = python(
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))",
        *("--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
    )
    assert "test_kernels.py: " in said
    assert "test_graphs.py: 6" in said
