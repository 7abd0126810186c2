"""The day itself: stage after stage, each within its limit, each kept as soon as it ends."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from evals.bench.gpu_day.machine import RealModel, lacks
from evals.bench.gpu_day.running import CUT_OFF, Tell, as_process, environment, now, run
from evals.bench.gpu_day.stages import Stage, stages
from evals.bench.gpu_day.state import CUT, DONE, FAILED, SKIPPED, Entry, Ran, read_state, write_state

LOG = "stage.log"
_LEAST_S = 1.0  # a command that is left less is not begun


@dataclass
class Day:
    """Where a day's results go, and how its stages are run. `machine`: the card, or that it is a CPU."""

    out: Path
    root: Path  # of the code and its tests
    machine: str
    tiny: bool
    limit_s: float
    model: RealModel | None = None
    tiny_models: Mapping[str, str] = field(default_factory=dict)
    again: bool = False
    known: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = read_state(self.out)

    @property
    def tests(self) -> Path:
        return self.root / "tests"

    def commands(self, stage: Stage) -> list[list[str]]:
        """Those of a stage, as they would be typed."""
        values = {"out": str(self.out / stage.name), "tests": str(self.tests), **self.tiny_models}
        if self.model is not None:
            model = self.model
            values |= {"model": model.name, "rank": str(model.rank), "budget": str(model.budget), "long": model.long}
        return stage.filled(values, tiny=self.tiny)

    def run(self, stage: Stage, tell: Tell) -> Entry:
        """Run what is left of a stage. What is interrupted is kept as cut off, and the interruption goes on."""
        reason = lacks(stage, tiny=self.tiny, model=self.model, tests=self.tests)
        if reason:
            return self._keep(Entry(stage.name, SKIPPED, reason, self.machine))
        commands = self.commands(stage)
        old = self.known.get(stage.name)
        done = old.done_of(self.machine, commands) if old and not self.again else []
        if old and old.status == DONE and len(done) == len(commands):
            old.before = True
            return old
        if self.again:
            self._set_aside(stage)
        entry = Entry(stage.name, CUT, "interrupted", self.machine, datetime.now(UTC).isoformat(timespec="seconds"))
        entry.ran += done
        try:
            self._run(stage, commands, entry, tell)
        finally:
            entry.files = self._files(stage)
            self._keep(entry)
        return entry

    def _run(self, stage: Stage, commands: Sequence[list[str]], entry: Entry, tell: Tell) -> None:
        folder = self.out / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        began, environ = now(), environment(self.root)
        kept = [ran.words for ran in entry.ran]
        for words in commands:
            if words in kept:
                continue
            left = self.limit_s - (now() - began)
            if left < min(_LEAST_S, self.limit_s):
                entry.status, entry.said = CUT, f"{self.limit_s:.0f} s were over before: {shlex.join(words)}"
                return
            tell(f"$ {shlex.join(words)}")
            started = now()
            code = run(as_process(words), folder / LOG, left, tell, environ)
            entry.ran.append(Ran(words, code, round(now() - started, 1)))
            self._keep(entry)
            if code == CUT_OFF:
                entry.status, entry.said = CUT, f"at {self.limit_s:.0f} s: {shlex.join(words)}"
                return
        self._judge(stage, entry)

    def _judge(self, stage: Stage, entry: Entry) -> None:
        bad = [ran for ran in entry.ran if ran.code]
        if bad:
            entry.status, entry.said = FAILED, "; ".join(f"exit code {r.code}: {shlex.join(r.words)}" for r in bad)
            return
        ok, entry.said = stage.check(self.out / stage.name) if stage.check else (True, "")
        entry.status = DONE if ok else FAILED

    def _set_aside(self, stage: Stage) -> None:
        """A stage that is run again starts in an empty folder; the old one stays beside it."""
        folder, number = self.out / stage.name, 1
        while folder.is_dir() and (aside := self.out / f"{stage.name}.before-{number}"):
            if not aside.exists():
                folder.rename(aside)
            number += 1

    def _files(self, stage: Stage) -> list[str]:
        found = sorted(path for path in (self.out / stage.name).rglob("*") if path.is_file())
        return [path.relative_to(self.out).as_posix() for path in found if not path.name.endswith(".lock")]

    def _keep(self, entry: Entry) -> Entry:
        self.known[entry.name] = entry
        self.out.mkdir(parents=True, exist_ok=True)
        order = [self.known[name] for name in stages() if name in self.known]
        write_state(self.out, order, machine=self.machine, tiny=self.tiny, limit_s=self.limit_s)
        return entry


def default_out(card_folder: str | None) -> Path:
    """`results/<card>`, or `results/gpu-day` where there is none."""
    return Path("results") / (card_folder or "gpu-day")


def code_root() -> Path:
    """The folder that holds the code, which commands are given to find it by."""
    return Path(__file__).resolve().parents[3]
