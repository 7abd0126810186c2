"""How results look in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from shadowkv.common.wording import plain_line

if TYPE_CHECKING:
    from evals.reporting.folders import Found
    from evals.reporting.sections import Section
    from evals.runs.runner import Step
    from evals.tables.table import Table as Figures

_PIPE_WIDTH = 180  # a pipe has no width of its own, and a table cut to 80 columns helps nobody
_NAME_WIDTH = 30  # names up to this are never broken: people copy them


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=_PIPE_WIDTH)


def safe(text: str, limit: int = 60) -> str:
    """Model output as one short line that can neither move the cursor nor be read as markup."""
    flat = plain_line(text)
    return escape(flat if len(flat) <= limit else flat[: limit - 1] + "…")


def say(text: str) -> None:
    """One line on stderr about what goes on."""
    print(f"skv: {plain_line(text)}", file=sys.stderr)


def print_summary(section: Section) -> None:
    """The benchmark's own tables, then methods x lengths with what they cost, then what a reader must know."""
    headline, *others = section.tables
    for table in others:
        print_table(table)
    narrow = section.narrow and replace(section.narrow, title=section.title)
    print_table(replace(headline, title=section.title), narrow=narrow)
    print_notes(section.notes)


def print_notes(notes: Sequence[str]) -> None:
    """What a reader must know, below the tables."""
    for note in notes:
        console().print(f"[yellow]{escape(note)}[/]")


def print_table(table: Figures, narrow: Figures | None = None) -> None:
    """A table on stdout; where it does not fit, without frames, and `narrow` in its place if there is one."""
    shown = console()
    roomy = _drawn(table, dense=False)
    unlimited = shown.options.update(width=10_000)
    fits = shown.measure(roomy, options=unlimited).maximum <= shown.width
    shown.print(roomy if fits else _drawn(narrow or table, dense=True))
    if table.caption:
        shown.print(f"[dim]{escape(table.caption)}[/]\n", highlight=False)


def _drawn(figures: Figures, *, dense: bool) -> Table:
    table = Table(title=escape(figures.title), title_justify="left")
    if dense:
        table.box, table.show_edge, table.padding = box.SIMPLE_HEAD, False, 0
    texts_only = figures.names == len(figures.columns)
    longest_name = max((len(row[0]) for row in figures.rows), default=0)
    for place, head in enumerate(figures.columns):
        named = place < figures.names
        whole = texts_only and place == 0 and longest_name <= _NAME_WIDTH
        table.add_column(
            escape(head),
            style="bold" if place == 0 else None,
            justify="left" if named else "right",
            overflow="fold",
            no_wrap=whole or not named,
        )
    grouped = figures.names > 1 and not texts_only  # the first column groups the rows
    last = None
    for row in figures.rows:
        if grouped and last not in (None, row[0]):
            table.add_section()
        table.add_row(*map(escape, ("" if grouped and row[0] == last else row[0], *row[1:])))
        last = row[0]
    return table


@contextmanager
def progress(*, shown: bool) -> Iterator[Callable[[Step], None]]:
    """A bar on stderr with the time that is left, fed with steps of an accuracy run."""
    with progress_bar(shown=shown) as advance:

        def on_step(step: Step) -> None:
            said = "computing the first prompt"
            if step.record is not None:
                said = f"{step.record.method} @ {step.record.length}: {safe(step.record.shown, 24)}"
            advance(step.done, step.total, said)

        yield on_step


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, fed with how many of how many are done, and what is being done."""
    # What is being done comes last and gives way: on a narrow terminal the time that is left must stay readable.
    said_last = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    bar = Progress(
        BarColumn(20), MofNCompleteColumn(), TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), said_last, console=console(stderr=True), disable=not shown, expand=True,
    )  # fmt: skip
    with bar:
        handle = bar.add_task("starting", total=None)
        yield lambda done, total, said: bar.update(handle, total=total, completed=done, description=said)


@contextmanager
def status(text: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr whose text can be changed."""
    if quiet:
        yield lambda _: None
        return
    with console(stderr=True).status(escape(text)) as shown:
        yield lambda now: shown.update(f"{escape(text)}: {escape(now)}")


@contextmanager
def filling(text: str, folder: Path) -> Iterator[None]:
    """A spinner on stderr with how much a folder holds by now."""
    with console(stderr=True).status(_Filling(text, folder)):
        yield


class _Filling:
    """Drawn many times a second; the folder is looked at once in a second."""

    def __init__(self, text: str, folder: Path) -> None:
        self._text, self._folder = text, folder
        self._looked_s, self._held_bytes = float("-inf"), 0

    def __rich__(self) -> str:
        if time.monotonic() - self._looked_s > 1:
            self._looked_s, self._held_bytes = time.monotonic(), _held_bytes(self._folder)
        return f"{escape(self._text)}: {self._held_bytes / 2**30:.2f} GiB so far"


def _held_bytes(folder: Path) -> int:
    """What the files of a folder take, links aside."""
    held = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # one that has been renamed since it was listed
            held += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
    return held


def say_problems(found: Found, left_out: Mapping[str, str] | None = None) -> None:
    """On stderr: what was odd about run folders, and which were left out and why."""
    shown = console(stderr=True)
    for run in found.runs:
        for problem in run.problems:
            shown.print(f"[yellow]{escape(plain_line(f'skv: {run.name}: {problem}'))}[/]", highlight=False)
    for name, why in (found.left_out if left_out is None else left_out).items():
        shown.print(f"[yellow]{escape(plain_line(f'skv: {name} is left out: {why}'))}[/]", highlight=False)
