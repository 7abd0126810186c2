"""How results look in a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from evals.tables import kib, mib, number, tokens

if TYPE_CHECKING:
    from evals.report import Report
    from evals.runner import Step
    from evals.summary import Row
    from evals.tables import Table as Figures

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_PIPE_WIDTH = 180  # a pipe has no width of its own, and a table cut to 80 columns helps nobody
_NAME_WIDTH = 30  # names up to this are never broken: people copy them


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=_PIPE_WIDTH)


def one_line(text: str) -> str:
    """Text as one line that cannot move the cursor, for plain printing."""
    return _CONTROL.sub(" ", text).strip()


def safe(text: str, limit: int = 60) -> str:
    """Model output as one short line that can neither move the cursor nor be read as markup."""
    flat = one_line(text)
    return escape(flat if len(flat) <= limit else flat[: limit - 1] + "…")


def quieten_libraries() -> None:
    """Keep transformers' progress bars and advice out of our output; its errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """A plain table on stdout; the first column says what a row is."""

    def made(*, dense: bool) -> Table:
        table = _table(title, caption, dense=dense)
        names = max((len(row[0]) for row in rows), default=0)
        table.add_column(columns[0], overflow="fold", style="bold", no_wrap=names <= _NAME_WIDTH)
        for column in columns[1:]:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        return table

    _print_fitting(made)


def print_summary(title: str, report: Report, notes: Sequence[str]) -> None:
    """The benchmark's own tables, then methods x lengths with what they cost, then what a reader must know."""
    for figures in report.tables:
        _print_figures(figures)
    _print_costs(title, report.rows)
    shown = console()
    for note in notes:
        shown.print(f"[yellow]{escape(note)}[/]")
    shown.print(
        "[dim]score: mean of the tasks' means · agree: tokens 2..n equal to full attention's (the first is the "
        "prefill's) · tokens read: per step, mean over layers · device, host: KV memory · prefill: once per prompt for "
        "all methods[/]"
    )


def _print_figures(figures: Figures) -> None:
    def made(*, dense: bool) -> Table:
        table = _table(figures.title, dense=dense)
        for place, column in enumerate(figures.columns):
            named = place < figures.names
            table.add_column(escape(column), style="bold" if place == 0 else None, overflow="fold",
                             justify="left" if named else "right", no_wrap=not named)  # fmt: skip
        last = ""
        for row in figures.rows:
            # With several columns of names, the first one groups the rows.
            if last not in ("", row[0]) and figures.names > 1:
                table.add_section()
            first = "" if row[0] == last and figures.names > 1 else row[0]
            table.add_row(*map(escape, (first, *row[1:])))
            last = row[0]
        return table

    _print_fitting(made)
    console().print(f"[dim]{escape(figures.caption)}[/]\n", highlight=False)


def _print_costs(title: str, rows: Sequence[Row]) -> None:
    """Score first, then what it cost. A narrow terminal gets the medians of decode times, and no build or bus."""

    def made(*, dense: bool) -> Table:
        table = _table(title, dense=dense)
        table.add_column("method", style="bold", overflow="fold")
        shown = [column for column in _COSTS if column.dense in (None, dense)]
        for column in shown:
            table.add_column(column.head, justify="right", no_wrap=True)
        for row, last in zip(rows, [None, *rows], strict=False):
            if last is not None and row.method != last.method:
                table.add_section()
            repeated = last is not None and row.method == last.method
            table.add_row("" if repeated else escape(row.method), *(column.cell(row) for column in shown))
        return table

    _print_fitting(made)


class _Cost(NamedTuple):
    head: str
    cell: Callable[[Row], str]
    dense: bool | None = None  # shown only where columns are scarce (True) or plenty (False)


def _scored(row: Row) -> str:
    counts = f"{row.scored}/{row.total}"
    return counts if row.scored == row.total else f"[red]{counts}[/]"


def _decode_times(row: Row) -> str:
    return "/".join(number(x, ".1f") for x in (row.decode_ms_p10, row.decode_ms_p50, row.decode_ms_p90))


_COSTS = (
    _Cost("length", lambda row: tokens(row.length)),
    _Cost("score", lambda row: number(row.score, ".2f")),
    _Cost("scored", _scored),
    _Cost("agree", lambda row: number(row.agreement, ".2f")),
    _Cost("tokens\nread", lambda row: number(row.attended_tokens, ".0f")),
    _Cost("device\nMiB", lambda row: mib(row.device_bytes)),
    _Cost("host\nMiB", lambda row: mib(row.host_bytes)),
    _Cost("bus KiB\n/token", lambda row: kib(row.bus_bytes), dense=False),
    _Cost("prefill\ns", lambda row: number(row.prefill_s, ".2f")),
    _Cost("build\ns", lambda row: number(row.build_s, ".3f"), dense=False),
    _Cost("decode ms\np10/p50/p90", _decode_times, dense=False),
    _Cost("decode\nms p50", lambda row: number(row.decode_ms_p50, ".1f"), dense=True),
)


def _table(title: str, caption: str = "", *, dense: bool) -> Table:
    """An empty table; a dense one spends no columns of the terminal on frames."""
    table = Table(title=escape(title), caption=escape(caption) or None, title_justify="left", caption_justify="left")
    if dense:
        table.box, table.show_edge, table.padding = box.SIMPLE_HEAD, False, 0
    return table


def _print_fitting(made: Callable[..., Table]) -> None:
    """Print the roomy table if the terminal has the room, else the dense one."""
    shown = console()
    roomy = made(dense=False)
    unlimited = shown.options.update(width=10_000)
    fits = shown.measure(roomy, options=unlimited).maximum <= shown.width
    shown.print(roomy if fits else made(dense=True))


@contextmanager
def progress(*, shown: bool) -> Iterator[Callable[[Step], None]]:
    """A bar on stderr with the time that is left, fed with steps of a run."""
    # What is being done comes last and gives way: on a narrow terminal the time that is left must stay readable.
    said_last = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    bar = Progress(
        BarColumn(20), MofNCompleteColumn(), TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), said_last, console=console(stderr=True), disable=not shown, expand=True,
    )  # fmt: skip
    with bar:
        handle = bar.add_task("starting", total=None)

        def advance(step: Step) -> None:
            said = "computing the first prompt"
            if step.record is not None:
                said = f"{step.record.method} @ {step.record.length}: {safe(step.record.prediction, 24)}"
            bar.update(handle, total=step.total, completed=step.done, description=said)

        yield advance


@contextmanager
def status(text: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr whose text can be changed."""
    if quiet:
        yield lambda _: None
        return
    with console(stderr=True).status(escape(text)) as shown:
        yield lambda now: shown.update(f"{escape(text)}: {escape(now)}")
