"""Baselines: run folders that others are compared with, replaced on purpose and with a line in the changelog."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from filelock import FileLock, Timeout

from evals.bench.records import BenchRecord
from evals.common.grouping import grouped
from evals.compare.gate import parse_gate
from evals.compare.report import counted
from evals.compare.run import compare
from evals.compare.sides import kind_of, read_manifest, read_side
from evals.runs.forced.record import ForcedRecord
from evals.runs.manifest import Manifest
from evals.runs.results import Record
from shadowkv.common.errors import SkvError
from shadowkv.common.reading import read_text
from shadowkv.common.wording import plain_line

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_UNRELEASED = "## Unreleased"
_WIDTH = 120


@dataclass(frozen=True)
class Update:
    """What was done."""

    folder: Path
    line: str  # of the changelog


def update_baseline(
    run: Path, name: str | None, into: Path, changelog: Path, *, reason: str = "", force: bool = False
) -> Update:
    """Make a finished run the baseline `into`/`name`, in place of the one there may be, and say so in `changelog`.

    Raises `SkvError` on a run that is half-written, unscored anywhere or of made-up weights, unless forced; and on one
    that another process is writing, always.
    """
    manifest = read_manifest("RUN", run)
    name = run.resolve().name if name is None else name
    if not _NAME.fullmatch(name):
        raise SkvError(f"'{name}' is not a name of a baseline: letters, digits, '.', '_' and '-'")
    target = into / name
    if target.resolve() == run.resolve():
        raise SkvError(f"{run} is the baseline itself; give the run that is to replace it")
    try:
        with FileLock(run / ".lock", timeout=0):
            reasons = unfit(run, manifest)
            if reasons and not force:
                raise SkvError(f"{run} is no baseline: {'; '.join(reasons)} (--force takes it all the same)")
            line = _line(run, name, target, manifest, reason, reasons)
            _replace(run, target)
            _write(changelog, line)
    except Timeout:
        raise SkvError(f"another skv process is writing to {run}") from None
    return Update(target, line)


def unfit(run: Path, manifest: Manifest) -> list[str]:
    """Why a run should not be what others are compared with."""
    kind = kind_of(manifest, run)
    if kind is BenchRecord:
        sweep = read_side("RUN", run, manifest, BenchRecord).records
        return _half_written(run, manifest, BenchRecord.FILE, [record.final for record in sweep])
    if kind is ForcedRecord:
        forced = read_side("RUN", run, manifest, ForcedRecord).records
        settled = [record.final for record in forced]
        return [*_half_written(run, manifest, ForcedRecord.FILE, settled), *_unanswered(manifest, forced)]
    answers = read_side("RUN", run, manifest, Record).records
    scored = [record.score is not None and isfinite(record.score) for record in answers]
    return [*_half_written(run, manifest, Record.FILE, scored), *_unanswered(manifest, answers)]


def _half_written(run: Path, manifest: Manifest, file: str, settled: Sequence[bool]) -> list[str]:
    reasons = []
    if manifest.model.get("dummy") or manifest.config.get("synthetic_kv"):
        reasons.append("its weights or keys are made up")
    if not all(settled):
        reasons.append(f"{settled.count(False)} of its {len(settled)} records have no score")
    if not (run / file).read_bytes().endswith(b"\n"):
        reasons.append("its last line is unfinished")
    if not (run / "summary.md").is_file():
        reasons.append("it did not finish: there is no summary.md")
    return reasons


def _unanswered(manifest: Manifest, records: Sequence[Record | ForcedRecord]) -> list[str]:
    """Questions that a method did not answer, though another did, or the settings ask for them."""
    questions = {r.asked for r in records}
    each = manifest.config.get("sampling", {}).get("answers", 1)
    answered = grouped(records, lambda r: r.method)
    missing = sum(len(questions) - len(answered.get(method, ())) for method in manifest.methods)
    reasons = [f"{missing} answers are missing that other methods gave"] if missing else []
    cells = grouped(sorted(questions), lambda q: (q.task, q.length_tokens, q.place))
    asked, selection = manifest.selection.get("samples"), manifest.selection
    if manifest.benchmark in ("ruler", "fidelity") and asked is not None:
        short = [f"{task} @ {length}" for (task, length, _), held in cells.items() if len(held) < asked * each]
        reasons += [f"fewer than {asked} samples of {', '.join(short)}"] if short else []
    if manifest.benchmark == "niah" and "turns" not in manifest.config and "depths" in selection:
        grid = len(selection["lengths"]) * len(selection["depths"]) * selection["rounds"]
        places = len({question.place for question in questions})
        wanted = places * (grid if asked is None else min(grid, asked)) * each
        what = "prompts are answered" if each == 1 else "answers are there"
        reasons += [f"{len(questions)} of {wanted} {what}"] if len(questions) < wanted else []
    return reasons


def _line(run: Path, name: str, target: Path, manifest: Manifest, reason: str, forced: Sequence[str]) -> str:
    """What the changelog says: which baseline, why, from which code, and what became of its scores."""
    said = [f"Baseline `{name}`: {'replaced' if target.exists() else 'new'}"]
    if reason:
        said.append(plain_line(reason).rstrip("."))
    commit = (manifest.sessions[-1].git or {}).get("commit")
    said.append(f"{manifest.benchmark} on {manifest.model['name']}, commit {commit[:9] if commit else 'unknown'}")
    if (target / "run.json").is_file():
        try:
            said.append(f"against the one before: {counted(compare(target, run, parse_gate(['nothing'])))}")
        except SkvError as error:
            said.append(f"not comparable with the one before ({plain_line(str(error))})")
    said += [f"forced although {why}" for why in forced]
    return "; ".join(said) + "."


def _write(changelog: Path, line: str) -> None:
    """Add a line to the unreleased changes, which are made if there are none."""
    entry = textwrap.fill(f"- {line}", _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    text = read_text(changelog) if changelog.is_file() else "# Changelog\n"
    if _UNRELEASED not in text.splitlines():
        title, _, rest = text.partition("\n")
        text = f"{title}\n\n{_UNRELEASED}\n\n{rest.lstrip()}"
    before, _, after = text.partition(_UNRELEASED)
    section, mark, later = after.partition("\n## ")
    text = f"{before}{_UNRELEASED}{section.rstrip() or chr(10)}\n{entry}\n" + (f"{mark}{later}" if mark else "")
    scratch = changelog.with_name(changelog.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, changelog)


def _replace(run: Path, target: Path) -> None:
    """Copy a run to where the baseline is, so that there is always a whole one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, stale = (target.with_name(f".{target.name}.{what}") for what in ("new", "old"))
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(run, fresh, ignore=shutil.ignore_patterns(".lock", "*.tmp"))
    if target.exists():
        target.rename(stale)
    fresh.rename(target)
    shutil.rmtree(stale, ignore_errors=True)
