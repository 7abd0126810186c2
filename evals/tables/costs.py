"""The table that every accuracy run has: methods x lengths, score first, then what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from evals.tables.summary import REFERENCE, Row, eight_bit_reference
from evals.tables.table import Table, kib, mib, number, tokens

_CAPTION = (
    "Score: mean over scored answers, of each task and then over tasks, with a 95 % bootstrap interval over samples. "
    "Agree: share of tokens 2..n equal to full attention's; the first one is the prefill's under every method. Tokens "
    "read: per decode step, mean over layers and heads, at most. Bus: what a decoded token moves between host and "
    "device. Prefill: median, once per prompt for all methods."
)

_RATIOS = (
    " KV x, speed x: device KV, and tokens per second of the median decode step, over those of full attention as it "
    "comes and in 8 bits at the same length."
)


class _Column(NamedTuple):
    head: str
    cell: Callable[[Row], str]
    dense: bool | None = None  # shown only where space is scarce (True) or plenty (False)


def _interval(row: Row) -> str:
    low, high = row.score_low, row.score_high
    return "–" if low is None or high is None else f"{low:.2f}–{high:.2f}"


def _decode_times(row: Row) -> str:
    return "/".join(number(x, ".1f") for x in (row.decode_ms_p10, row.decode_ms_p50, row.decode_ms_p90))


_COLUMNS = (
    _Column("method", lambda row: row.method),
    _Column("length", lambda row: tokens(row.length)),
    _Column("score", lambda row: number(row.score, ".2f")),
    _Column("95 %", _interval, dense=False),
    _Column("scored", lambda row: f"{row.scored}/{row.total}"),
    _Column("agree", lambda row: number(row.agreement, ".2f")),
    _Column("tokens\nread", lambda row: number(row.attended_tokens, ".0f")),
    _Column("device\nKV MiB", lambda row: mib(row.device_bytes)),
    _Column("host\nKV MiB", lambda row: mib(row.host_bytes)),
    _Column("bus KiB\n/token", lambda row: kib(row.bus_bytes), dense=False),
    _Column("prefill\ns", lambda row: number(row.prefill_s, ".2f")),
    _Column("build\ns", lambda row: number(row.build_s, ".3f"), dense=False),
    _Column("decode ms\np10/p50/p90", _decode_times, dense=False),
    _Column("decode\nms p50", lambda row: number(row.decode_ms_p50, ".1f"), dense=True),
)


def _rate(row: Row) -> float | None:
    return 1000 / row.decode_ms_p50 if row.decode_ms_p50 else None


def _over(rows: Sequence[Row], label: str, value: Callable[[Row], float | None]) -> Callable[[Row], str]:
    """A cell with what a method has over what the method of that label has at the same length."""
    found = {row.length: value(row) for row in rows if row.method == label}

    def cell(row: Row) -> str:
        mine, theirs = value(row), found.get(row.length)
        return number(mine / theirs if mine is not None and theirs else None, ".2f")

    return cell


def _ratio_columns(rows: Sequence[Row]) -> list[_Column]:
    """Memory and speed over those of both references, where full attention ran in 8 bits too."""
    eight_bit = eight_bit_reference([row.method for row in rows])
    compared = (("KV", lambda row: row.device_bytes), ("speed", _rate))
    return [
        _Column(f"{name}\nx {label}", _over(rows, label, value), dense=False)
        for label in ((REFERENCE, eight_bit) if eight_bit else ())
        for name, value in compared
    ]


def cost_table(title: str, rows: Sequence[Row], *, dense: bool = False) -> Table:
    """One line per row; the dense one has fewer columns, for a narrow terminal."""
    ratios = _ratio_columns(rows)
    shown = [column for column in (*_COLUMNS, *ratios) if column.dense in (None, dense)]
    lines = [[column.cell(row) for column in shown] for row in rows]
    return Table(title, [column.head for column in shown], lines, _CAPTION + (_RATIOS if ratios else ""), names=2)
