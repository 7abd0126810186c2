"""What a day came to: a table for the terminal, and a page with every command and what to do about what failed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.bench.gpu_day.stages import Stage
from evals.bench.gpu_day.state import CUT, DONE, FAILED, Entry
from evals.tables.table import Table

PAGE = "gpu-day.md"
_SHOWN = 3


def stage_table(chosen: Sequence[Stage], limit_s: float) -> Table:
    """What the stages are."""
    rows = [
        [
            stage.name,
            stage.purpose,
            stage.needs,
            str(len(stage.commands)),
            stage.writes,
            stage.on_failure,
        ]
        for stage in chosen
    ]
    columns = ["stage", "what it is for", "needs", "commands", "writes", "when it fails"]
    caption = f"In this order, each at most {limit_s:.0f} s. Nothing was run."
    return Table("a day on a GPU", columns, rows, caption, names=6)


def summary_table(entries: Sequence[Entry], machine: str) -> Table:
    """Stage, status, seconds, files."""
    rows = [[entry.name, _status(entry), f"{entry.seconds:.0f}", _files(entry)] for entry in entries]
    return Table(f"a day on {machine}", ["stage", "status", "seconds", "files"], rows, names=4)


def page(entries: Sequence[Entry], known: Mapping[str, Stage], machine: str, *, tiny: bool) -> str:
    """Everything, in Markdown; links are to files beside it."""
    parts = [f"# A day on {machine}"]
    if tiny:
        parts.append("Smallest forms, on a CPU: that the stages run, and nothing of what they are for.")
    parts.append(summary_table(entries, machine).markdown().partition("\n\n")[2].rstrip())
    for entry in entries:
        stage = known[entry.name]
        lines = [f"## {entry.name}: {entry.status}", "", stage.purpose[0].upper() + stage.purpose[1:] + "."]
        if entry.said:
            lines += ["", entry.said]
        if entry.status in (FAILED, CUT):
            lines += ["", f"When it fails: {stage.on_failure}."]
        if entry.ran:
            lines += ["", "```", *(f"{r.code:3d} {r.seconds:6.1f} s  {shlex.join(r.words)}" for r in entry.ran), "```"]
        lines += [""] * bool(entry.files) + [f"- [{file}]({file})" for file in entry.files if _worth_a_link(file)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def write_page(out: Path, entries: Sequence[Entry], known: Mapping[str, Stage], machine: str, *, tiny: bool) -> Path:
    """The page, beside what it links to."""
    file = out / PAGE
    file.write_text(page(entries, known, machine, tiny=tiny), encoding="utf-8")
    return file


def exit_code_of(entries: Sequence[Entry]) -> int:
    """0, or 1 where something failed or was cut off. What was skipped is said, and no failure."""
    return 1 if any(entry.status in (FAILED, CUT) for entry in entries) else 0


def _status(entry: Entry) -> str:
    if entry.status == DONE:
        return "done before" if entry.before else "done"
    return f"{entry.status}: {entry.said}" if entry.said else entry.status


def _files(entry: Entry) -> str:
    shown = [file for file in entry.files if _worth_a_link(file)]
    more = len(entry.files) - len(shown[:_SHOWN])
    return " ".join([*shown[:_SHOWN], *[f"and {more} more"] * bool(more)]) if entry.files else "–"


def _worth_a_link(file: str) -> bool:
    return file.endswith(("summary.md", "probe.json", "stage.log", ".xml")) or file.count("/") == 1
