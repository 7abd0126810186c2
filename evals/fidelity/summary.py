"""Forced records summed up: how far a method is from full attention, by length, position and distance.

Tokens of one prompt are no independent samples, so every interval draws prompts, with all their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evals.common.asking.question import shown
from evals.common.grouping import grouped
from evals.runs.forced.record import ForcedRecord
from evals.tables.statistics import interval_95, mean_of_known, mean_of_means, percentile

_FARTHEST = "needle_token"  # of a record's meta: where in the prompt the token is that the question is about


@dataclass(frozen=True)
class FidelityRow:
    """One method at one length. Failed prompts are counted, and left out of every mean."""

    method: str
    length: int
    kl: float | None  # nats per token: mean over prompts of their means, as all that follows
    kl_low: float | None  # 95 % bootstrap interval over prompts
    kl_high: float | None
    kl_p99: float | None  # over all tokens
    top1: float | None  # share of tokens at which both find the same token most likely
    top5: float | None  # share of full attention's five most likely among the method's
    rank_p99: float | None  # of full attention's most likely token in the method's order, over all tokens
    perplexity: float | None  # of what comes next
    perplexity_ratio: float | None  # to full attention's on the same tokens
    ratio_low: float | None
    ratio_high: float | None
    done: int
    total: int
    tokens: int  # compared, over all prompts
    prompt_tokens: float | None
    attended_tokens: float | None
    device_bytes: float | None
    host_bytes: float | None
    bus_bytes: float | None
    prefill_s: float | None
    build_s: float | None
    force_ms_per_token: float | None


def shown_forced(records: Sequence[ForcedRecord]) -> list[ForcedRecord]:
    """Records under the labels that tables and plots show: those of one method asked in two ways are two rows."""
    return [replace(record, method=shown(record.method, record.question)) for record in records]


def summarise_forced(records: Sequence[ForcedRecord]) -> list[FidelityRow]:
    """Rows by method, in order of first appearance, then by length."""
    cells = grouped(records, lambda r: (r.method, r.length))
    order = list(dict.fromkeys(record.method for record in records))
    return [_row(*cell, cells[cell]) for cell in sorted(cells, key=lambda cell: (order.index(cell[0]), cell[1]))]


def _row(method: str, length: int, records: Sequence[ForcedRecord]) -> FidelityRow:
    good = [record for record in records if record.final]
    kls, more = ([record.mean_kl for record in good], [record.more_nll for record in good])
    kl_interval, more_interval = interval_95([kls]), interval_95([more])
    nll = mean_of_means([[float(np.mean(record.nll)) for record in good]])
    loss = mean_of_means([more])
    cold = [r.prefill_s for r in good if r.reused_tokens == 0] or [r.prefill_s for r in good]
    return FidelityRow(
        method=method,
        length=length,
        kl=mean_of_means([kls]),
        kl_low=kl_interval and kl_interval[0],
        kl_high=kl_interval and kl_interval[1],
        kl_p99=percentile([x for r in good for x in r.kl], 99),
        top1=mean_of_means([[float(np.mean(r.top1)) for r in good]]),
        top5=mean_of_means([[float(np.mean(r.top5)) / 5 for r in good]]),
        rank_p99=percentile([x for r in good for x in r.rank], 99),
        perplexity=None if nll is None else float(np.exp(nll)),
        perplexity_ratio=None if loss is None else float(np.exp(loss)),
        ratio_low=more_interval and float(np.exp(more_interval[0])),
        ratio_high=more_interval and float(np.exp(more_interval[1])),
        done=len(good),
        total=len(records),
        tokens=sum(len(r.kl) for r in good),
        prompt_tokens=mean_of_known([r.prompt_tokens for r in good]),
        attended_tokens=mean_of_known([r.attended_tokens for r in good]),
        device_bytes=mean_of_known([r.device_bytes for r in good]),
        host_bytes=mean_of_known([r.host_bytes for r in good]),
        bus_bytes=mean_of_known([r.bus_bytes for r in good]),
        prefill_s=percentile(cold, 50),
        build_s=percentile([r.build_s for r in good], 50),
        force_ms_per_token=percentile([1000 * r.force_s / len(r.kl) for r in good], 50),
    )


def by_position(records: Sequence[ForcedRecord], values: Callable[[ForcedRecord], Sequence[float]]) -> list[float]:
    """Mean over prompts at each place of the continuation, as far as any prompt goes."""
    rows = [values(record) for record in records if record.final]
    longest = max(map(len, rows), default=0)
    return [float(np.mean([row[place] for row in rows if place < len(row)])) for place in range(longest)]


def binned(values: Sequence[float], bins: int) -> list[float]:
    """Means over so many stretches of equal length, as far as possible."""
    return [float(np.mean(part)) for part in np.array_split(np.asarray(values), min(bins, len(values))) if len(part)]


def by_distance(records: Sequence[ForcedRecord]) -> dict[int, list[ForcedRecord]]:
    """Records whose prompt says where the token is that the question is about, by its distance in quarters of it."""
    told = [record for record in records if record.final and isinstance(record.meta.get(_FARTHEST), int)]
    return dict(sorted(grouped(told, _quarter).items()))


def _quarter(record: ForcedRecord) -> int:
    distance = 1 - record.meta[_FARTHEST] / max(record.prompt_tokens, 1)
    return min(int(4 * distance), 3)
