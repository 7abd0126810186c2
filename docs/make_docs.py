"""Fills the generated blocks of README.md and docs/: tables of run folders, and what commands print.

`make docs` runs this file; docs/README.md says how a block is written. Tables are those of a run's summary.md, which
`skv report` makes of the records, so that a figure in a page is the figure of a report.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "results" / "baselines"
_OPEN = re.compile(r"<!-- (table|output): (.+) -->")
_CLOSE = "<!-- end -->"
_OPTIONS = ("title", "columns", "rows", "where", "notes")


class Figures(NamedTuple):
    """One table of a summary.md, as text."""

    columns: list[str]
    rule: list[str]
    rows: list[list[str]]


def pages() -> list[Path]:
    """Every page that may hold blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with all its blocks made anew. Raises ValueError for a block that cannot be made or does not end."""
    lines, fenced = iter(text.splitlines()), False
    made = []
    for line in lines:
        made.append(line)
        fenced ^= line.lstrip().startswith("```")
        if not fenced and (found := _OPEN.fullmatch(line.strip())):
            if not any(inner.strip() == _CLOSE for inner in lines):
                raise ValueError(f"no {_CLOSE} after {line}")
            try:
                made += ["", *(_table if found[1] == "table" else _output)(found[2]), "", _CLOSE]
            except ValueError as error:
                raise ValueError(f"{line}: {error}") from None
    return "\n".join(made) + "\n"


def _table(asked: str) -> list[str]:
    name, *words = shlex.split(asked)
    summary = RUNS / name / "summary.md"
    if not summary.is_file():
        raise ValueError(f"no run folder {name} with a summary.md in results/baselines")
    return _shown(summary.read_text(encoding="utf-8"), _options(words))


def _output(asked: str) -> list[str]:
    command, _, words = asked.partition(" -- ")
    said = _run(command)
    if command.startswith("skv plan"):
        return _shown(said, _options(shlex.split(words)))
    return ["```", *(line.rstrip() for line in said.strip("\n").splitlines()), "```"]


@cache
def _run(command: str) -> str:
    """What a command says: of a plan its tables in Markdown, else its stdout."""
    from cli.main import main

    said, told = io.StringIO(), io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(told),
    ):
        plan = command.startswith("skv plan")
        code = main([*shlex.split(command)[1:], *(["--out", folder] if plan else [])])
        if code != 0:
            raise ValueError(f"exit code {code}: {told.getvalue().strip()}")
        return (Path(folder) / "plan.md").read_text(encoding="utf-8") if plan else said.getvalue()


def _options(words: Sequence[str]) -> dict[str, str]:
    options = dict(word.split("=", 1) if "=" in word else (word, "") for word in words)
    if unknown := options.keys() - set(_OPTIONS):
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(_OPTIONS)}")
    return options


def _shown(text: str, options: Mapping[str, str]) -> list[str]:
    """The asked columns and rows of one table, and below it what its run says at every table."""
    tables = dict(_tables(text))
    title = options.get("title", next(iter(tables), ""))
    if title not in tables:
        raise ValueError(f"no table {title!r}; there are: {'; '.join(tables)}")
    table = tables[title]
    columns = [name.strip() for name in options["columns"].split(",")] if "columns" in options else table.columns
    if absent := [name for name in columns if name not in table.columns]:
        raise ValueError(f"no column {absent}; there are: {', '.join(table.columns)}")
    places = [table.columns.index(name) for name in columns]
    rows = [row for row in table.rows if _wanted(dict(zip(table.columns, row, strict=True)), options)]
    if not rows:
        raise ValueError("no row is left")
    lines = [_line([cells[place] for place in places]) for cells in (table.columns, *rows)]
    lines.insert(1, "|" + "|".join(table.rule[place] for place in places) + "|")
    notes = [] if options.get("notes") == "no" else re.findall(r"^\*\*(.+)\*\*$", text, re.MULTILINE)
    return lines + [line for note in notes for line in ("", f"*{note}*")]


def _wanted(row: Mapping[str, str], options: Mapping[str, str]) -> bool:
    """Whether a row is of one of the methods in `rows` (a name, a label, or a pattern) and of all values in `where`."""
    label = row.get("method", "")
    patterns = options.get("rows", "*").split()
    mine = any(fnmatchcase(label, pattern) or label.partition(":")[0] == pattern for pattern in patterns)
    return mine and all(row.get(name) == value for name, _, value in _pairs(options.get("where", "")))


def _pairs(text: str) -> list[tuple[str, str, str]]:
    return [pair.strip().partition("=") for pair in text.split(",") if pair]


def _tables(text: str) -> Iterator[tuple[str, Figures]]:
    """Tables of a page in Markdown by their titles, without what is put in brackets behind these."""
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, *lines = part.splitlines()
        head, rule, *rows = [_cells(line) for line in lines if line.startswith("|")]
        yield re.sub(r" \[.*\]$", "", title), Figures(head, rule, rows)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_pages() -> None:
    """Make every block of every page anew."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        anew = filled(text)
        if anew != text:
            page.write_text(anew, encoding="utf-8")


if __name__ == "__main__":
    write_pages()
