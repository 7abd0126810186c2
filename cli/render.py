"""How results look in a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from evals.report import Row
    from evals.runner import Step

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_PIPE_WIDTH = 180  # a pipe has no width of its own, and a table cut to 80 columns helps nobody


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=_PIPE_WIDTH)


def safe(text: str, limit: int = 60) -> str:
    """Model output as one line that can neither move the cursor nor be read as markup."""
    flat = _CONTROL.sub(" ", text).strip()
    return escape(flat if len(flat) <= limit else flat[: limit - 1] + "…")


def quieten_libraries() -> None:
    """Keep transformers' progress bars and advice out of our output; its errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """A plain table on stdout; the first column says what a row is."""
    table = Table(title=escape(title), caption=escape(caption) or None, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", style="bold" if index == 0 else None)
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def print_summary(title: str, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Methods x lengths: score first, then what it cost."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("method", style="bold", overflow="fold")
    for column in ("length", "score", "scored", "agree", "KV device", "KV host", "prefill s", "build s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("decode ms/token p10/p50/p90", justify="right")
    last = None
    for row in rows:
        times = (row.decode_ms_p10, row.decode_ms_p50, row.decode_ms_p90)
        cells = [
            escape(row.method) if row.method != last else "",
            f"{row.length // 1024}k" if row.length % 1024 == 0 else str(row.length),
            _number(row.score, ".2f"),
            f"{row.scored}/{row.total}" if row.scored == row.total else f"[red]{row.scored}/{row.total}[/]",
            _number(row.agreement, ".2f"),
            _size(row.device_bytes),
            _size(row.host_bytes),
            _number(row.prefill_s, ".2f"),
            _number(row.build_s, ".3f"),
            "/".join(_number(x, ".1f") for x in times),
        ]
        if last is not None and row.method != last:
            table.add_section()
        table.add_row(*cells)
        last = row.method
    shown = console()
    shown.print(table)
    for note in notes:
        shown.print(f"[yellow]{escape(note)}[/]")
    shown.print(
        "[dim]agree: tokens 2..n equal to full attention's (the first is dense under every method) · prefill: once per "
        "prompt for all methods[/]"
    )


@contextmanager
def progress(*, shown: bool) -> Iterator[Callable[[Step], None]]:
    """A bar on stderr with the time that is left, fed with steps of a run."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns, TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=console(stderr=True), disable=not shown,
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


def _size(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
