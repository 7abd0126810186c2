"""What forced continuations show: tables by length, position and distance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from evals.common.grouping import grouped
from evals.fidelity.summary import FidelityRow, binned, by_distance, by_position, summarise_forced
from evals.runs.forced.record import ForcedRecord
from evals.tables.table import Table, mib, number, percent, tokens

_POSITIONS = 4
_QUARTERS = ("last quarter", "third", "second", "first quarter")
_CAPTION = (
    "KL: of the method's next-token distribution from full attention's, nats per token fed, with a 95 % bootstrap "
    "interval over prompts. p99: over all tokens. Top 1, top 5: share of full attention's most likely token, of its "
    "five, that the method has there too. Rank: of full attention's most likely token, p99. Perplexity: of what comes "
    "next, and as a ratio to full attention's on the same tokens. Tokens read: per decode step, at most."
)


def fidelity_tables(records: Sequence[ForcedRecord]) -> list[Table]:
    """The headline, then KL by position, and by distance where prompts tell."""
    return [fidelity_table("Fidelity", summarise_forced(records)), *_by_position(records), *_by_distance(records)]


def fidelity_table(title: str, rows: Sequence[FidelityRow], *, dense: bool = False) -> Table:
    """One line per method and length; the dense one has fewer columns, for a narrow terminal."""
    columns = ["method", "length", "KL", "95 %", "KL\np99", "top 1\n%", "top 5\n%", "rank\np99", "perplexity"]
    columns += [
        "ratio",
        "95 %",
        "prompts",
        "tokens\nread",
        "device\nKV MiB",
        "host\nKV MiB",
        "build\ns",
        "ms per\ntoken",
    ]
    lines = [
        [
            row.method,
            tokens(row.length),
            kl(row.kl),
            "–" if row.kl_low is None else f"{kl(row.kl_low)}–{kl(row.kl_high)}",
            kl(row.kl_p99),
            percent(row.top1),
            percent(row.top5),
            number(row.rank_p99, ".0f"),
            number(row.perplexity, ".2f"),
            number(row.perplexity_ratio, ".4f"),
            "–" if row.ratio_low is None else f"{row.ratio_low:.4f}–{row.ratio_high:.4f}",
            f"{row.done}/{row.total}",
            number(row.attended_tokens, ".0f"),
            mib(row.device_bytes),
            mib(row.host_bytes),
            number(row.build_s, ".3f"),
            number(row.force_ms_per_token, ".1f"),
        ]
        for row in rows
    ]
    if dense:
        shown = [i for i, head in enumerate(columns) if head not in {"95 %", "rank\np99", "build\ns", "ms per\ntoken"}]
        columns, lines = [columns[i] for i in shown], [[line[i] for i in shown] for line in lines]
    return Table(title, columns, lines, _CAPTION, names=2)


def kl(value: float | None) -> str:
    """Nats: three digits from a thousandth on, powers of ten below."""
    return "–" if value is None else f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.1e}"


def _by_position(records: Sequence[ForcedRecord]) -> list[Table]:
    cells = grouped([r for r in records if r.final], lambda r: (r.method, r.length))
    if not cells or max(len(r.kl) for r in records) < _POSITIONS:
        return []
    lines = [
        [method, tokens(length), *map(kl, binned(by_position(found, lambda r: r.kl), _POSITIONS))]
        for (method, length), found in cells.items()
    ]
    longest = max(len(r.kl) for r in records)
    edges = [round(longest * i / _POSITIONS) for i in range(_POSITIONS + 1)]
    heads = [f"{start + 1}–{end}" for start, end in pairwise(edges)]
    caption = "Mean over prompts; position: of the token fed, counted from the end of the prompt."
    lines = [[*line, *["–"] * (2 + _POSITIONS - len(line))] for line in lines]
    return [Table("KL by position", ["method", "length", *heads], lines, caption, names=2)]


def _by_distance(records: Sequence[ForcedRecord]) -> list[Table]:
    lines = []
    for (method, length), found in grouped(records, lambda r: (r.method, r.length)).items():
        quarters = by_distance(found)
        if quarters:
            held = [[r.mean_kl for r in quarters.get(quarter, ())] for quarter in range(4)]
            lines.append([method, tokens(length), *(kl(sum(x) / len(x)) if x else "–" for x in held)])
    if not lines:
        return []
    caption = "Where in the prompt what is asked for stands. Mean over prompts."
    return [Table("KL by where the needle is", ["method", "length", *_QUARTERS], lines, caption, names=2)]
