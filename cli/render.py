"""How results look in a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

if TYPE_CHECKING:
    from evals.report import Row
    from evals.runner import Step

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


def print_summary(title: str, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Methods x lengths: score first, then what it cost. A narrow terminal gets the median of the decode times only."""

    def made(*, dense: bool) -> Table:
        table = _table(title, dense=dense)
        table.add_column("method", style="bold", overflow="fold")
        decode = "decode\nms p50" if dense else "decode ms/token\np10/p50/p90"
        for column in (
            "length",
            "score",
            "scored",
            "agree",
            "device\nMiB",
            "host\nMiB",
            "prefill\ns",
            "build\ns",
            decode,
        ):
            table.add_column(column, justify="right", no_wrap=True)
        for row, last in zip(rows, [None, *rows], strict=False):
            if last is not None and row.method != last.method:
                table.add_section()
            repeated = last is not None and row.method == last.method
            table.add_row("" if repeated else escape(row.method), *_cells(row, dense=dense))
        return table

    _print_fitting(made)
    shown = console()
    for note in notes:
        shown.print(f"[yellow]{escape(note)}[/]")
    shown.print(
        "[dim]agree: tokens 2..n equal to full attention's (the first is always the prefill's) · device, host: KV "
        "memory · prefill: once per prompt for all methods[/]"
    )


def _cells(row: Row, *, dense: bool) -> list[str]:
    times = (row.decode_ms_p50,) if dense else (row.decode_ms_p10, row.decode_ms_p50, row.decode_ms_p90)
    return [
        f"{row.length // 1024}k" if row.length % 1024 == 0 else str(row.length),
        _number(row.score, ".2f"),
        f"{row.scored}/{row.total}" if row.scored == row.total else f"[red]{row.scored}/{row.total}[/]",
        _number(row.agreement, ".2f"),
        _mib(row.device_bytes),
        _mib(row.host_bytes),
        _number(row.prefill_s, ".2f"),
        _number(row.build_s, ".3f"),
        "/".join(_number(x, ".1f") for x in times),
    ]


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


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.1f}"
