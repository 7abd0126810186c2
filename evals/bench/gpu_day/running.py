"""One command as a process of its own: told line by line, kept in a log, stopped at its limit with all it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

Tell = Callable[[str], None]

CUT_OFF = 124  # exit code of a command that met its limit, as `timeout` has it
_MOST_GRACE_S = 10.0
_SET_ASIDE = ("TRITON_INTERPRET",)  # kernels are compiled, or commands set it themselves


def as_process(words: Sequence[str]) -> list[str]:
    """The command line of `skv ...` or `pytest ...` by this interpreter."""
    module = {"skv": "cli"}.get(words[0], words[0])
    return [sys.executable, "-m", module, *words[1:]]


def environment(root: Path) -> dict[str, str]:
    """Of every command: nothing is fetched, code is that of `root`, output comes as it is written."""
    kept = {name: value for name, value in os.environ.items() if name not in _SET_ASIDE}
    paths = [str(root), *filter(None, [kept.get("PYTHONPATH")])]
    kept |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "SKV_OFFLINE": "1"}
    kept.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # caches that grow fit what they left
    return kept


def run(process: Sequence[str], log: Path, limit_s: float, tell: Tell, environ: Mapping[str, str]) -> int:
    """The exit code, or `CUT_OFF`.

    A command is interrupted shortly before its limit, as by Ctrl-C, so that it can close its files, and killed at it.
    Whatever ends the wait, nothing that it started is left.
    """
    grace = min(_MOST_GRACE_S, limit_s / 10)
    with log.open("a", encoding="utf-8") as kept:
        child = subprocess.Popen(
            process,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            env=dict(environ),
        )
        assert child.stdout is not None
        reader = threading.Thread(target=_tee, args=(child.stdout, kept, tell), daemon=True)
        reader.start()
        try:
            code = child.wait(max(0.0, limit_s - grace))
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(grace)
            code = CUT_OFF
        finally:
            _signal(child, signal.SIGKILL)
            child.wait()
            reader.join(_MOST_GRACE_S)
    return code


def _signal(child: subprocess.Popen[str], number: signal.Signals) -> None:
    # Its session is its own, so its number is that of the group of all that it started.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _tee(lines: TextIO, log: TextIO, tell: Tell) -> None:
    for line in lines:
        with suppress(ValueError):  # the log was closed: the wait for the last lines has ended
            log.write(line)
            log.flush()
        tell(line.rstrip("\n"))


def now() -> float:
    """Seconds of a clock that only goes forward."""
    return time.monotonic()
