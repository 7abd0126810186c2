"""What libraries have to say stays away from a user's terminal; what we have to say does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import pytest

# Our own bar is drawn once, when it is done, where stderr is no terminal.
OURS = re.compile(r"^(skv: .*|[━╸╺ ]*\d+/\d+ elapsed .*|\s*)$")


def run(*words, code=None, **environ):
    """A command in a process of its own, as the console script would run it, with libraries as they come."""
    quiet = {"PYTHONWARNINGS", "TQDM_DISABLE", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"}
    inherited = {name: value for name, value in os.environ.items() if name not in quiet}
    started = ["-c", textwrap.dedent(code)] if code else ["-m", "cli.main"]
    done = subprocess.run(
        [sys.executable, *started, *words], capture_output=True, text=True, check=False, env=inherited | environ
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def foreign(done):
    """Lines on stderr that are not ours."""
    return [line for line in done.stderr.splitlines() if not OURS.match(line)]


SMALL = ["--haystack", "synthetic", "-m", "full", "-m", "quest:budget=64"]
NIAH = ["--lengths", "300", "--depths", "2", "--max-new-tokens", "3", *SMALL]
BENCH = ["--context", "256", "--steps", "2", "--warmup", "0", "--batch", "1", *SMALL]


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "niah", "--model", "TINY", *NIAH],
        ["eval", "niah", "--model", "TINY", *NIAH, "--workers", "2"],
        ["eval", "ruler", "--model", "TINY", "--wording", "own", "--tasks", "vt", "--lengths", "3k", "--samples", "1",
         "-m", "full"],
        ["bench", "throughput", "--model", "TINY", *BENCH, "--repeats", "1"],
        ["bench", "latency", "--model", "TINY", *BENCH],
        ["calibrate", "--model", "TINY", "--text", "synthetic", "--tokens", "256"],
        ["plan", "-m", "full"],
    ],
    ids=lambda words: " ".join(words[:2]),
)  # fmt: skip
def test_only_our_lines_reach_stderr(words, tiny_folder, tmp_path):
    out = [] if words[0] in ("calibrate", "plan") else ["--out", str(tmp_path / "run")]
    argv = [str(tiny_folder) if word == "TINY" else word for word in words]
    done = run(*argv, *out, SKV_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert foreign(done) == []


def test_progress_bars_of_libraries_are_not_drawn():
    """The first is the one that unpacking a GGUF file draws."""
    done = run(
        code="""
        from cli.shared.quiet import quieten
        quieten()
        import transformers
        from transformers.utils import logging
        from tqdm import tqdm
        list(logging.tqdm(range(3), desc="Converting and de-quantizing GGUF tensors..."))
        list(tqdm(range(3), desc="another library's"))
        """
    )
    assert done.stderr == ""


LOUD = """
    import logging, sys, warnings
    from cli.models import info
    from cli import main
    from shadowkv.common.errors import SkvWarning

    def models(as_json: bool = False) -> None:
        warnings.simplefilter("always")  # as some libraries do
        warnings.warn("a library's", FutureWarning)
        warnings.warn("ours", SkvWarning)
        logging.getLogger("a.library").warning("its advice")
        logging.getLogger("a.library").error("its failure")

    main.app.registered_commands = [c for c in main.app.registered_commands if c.name != "models"]
    main.app.command("models")(models)
    main.run()
"""


def test_warnings_of_libraries_are_dropped_and_ours_are_lines():
    said = run("models", code=LOUD).stderr
    assert said.splitlines() == ["skv: note: ours", "its failure"]


def test_debug_leaves_libraries_as_they_are():
    said = run("models", "--debug", code=LOUD).stderr
    assert all(words in said for words in ("a library's", "ours", "its advice", "its failure"))
