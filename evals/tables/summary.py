"""Records summed up: what a method scored and cost at a length, and what it scored in each task."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from evals.common.asking.question import IN_PROMPT, method_of, shown
from evals.common.grouping import grouped
from evals.runs.results import Record
from evals.runs.task import Question
from evals.tables.statistics import interval_95, mean_of_known, mean_of_means, percentile

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
REFERENCE = "full"  # the label of what everything is compared with
_EIGHT_BIT = ("full:kv=fp8", "full:kv=int8")


class OfMethod(Protocol):
    """Any record that says which method it is of."""

    @property
    def method(self) -> str: ...


@dataclass(frozen=True)
class Row:
    """One method at one length. Unscored answers are counted, and left out of every mean."""

    method: str
    length: int
    score: float | None  # 0..1, mean over tasks of the mean over their prompts' scored answers
    score_low: float | None  # 95 % bootstrap interval over prompts
    score_high: float | None
    scored: int
    total: int
    agreement: float | None  # share of tokens 2..n equal to full attention's, mean over examples
    prompt_tokens: float | None  # mean
    attended_tokens: float | None  # per decode step, mean over layers, heads and examples
    device_bytes: float | None
    host_bytes: float | None
    bus_bytes: float | None  # between host and device, per decoded token
    prefill_s: float | None  # median, of the prompts computed without a reused prefix where there are any
    build_s: float | None
    decode_ms_p10: float | None
    decode_ms_p50: float | None
    decode_ms_p90: float | None


@dataclass(frozen=True)
class TaskScore:
    """One method in one task at one length."""

    method: str
    length: int
    task: str
    score: float | None  # 0..1
    score_low: float | None
    score_high: float | None
    scored: int
    total: int


def summarise(records: Sequence[Record]) -> list[Row]:
    """Rows by method, in order of first appearance, then by length."""
    references = full_answers(records)
    cells = grouped(records, lambda r: (r.method, r.length))
    order = {label: place for place, label in enumerate(methods_of(records))}
    return [
        _row(label, length, cells[label, length], references)
        for label, length in sorted(cells, key=lambda cell: (order[cell[0]], cell[1]))
    ]


def task_scores(records: Sequence[Record]) -> list[TaskScore]:
    """Scores by method, length and task, in order of first appearance."""
    cells = grouped(records, lambda r: (r.method, r.length, r.task))
    return [_task_score(*cell, found) for cell, found in cells.items()]


def eight_bit_reference(methods: Collection[str]) -> str | None:
    """The full attention in 8 bits that tables compare with too: where it ran, and full attention beside it."""
    return next((label for label in _EIGHT_BIT if label in methods), None) if REFERENCE in methods else None


def methods_of(records: Sequence[OfMethod]) -> list[str]:
    """Labels in order of first appearance."""
    return list(dict.fromkeys(record.method for record in records))


def shown_records(records: Sequence[Record]) -> list[Record]:
    """Records under the labels that tables and plots show: those of one method asked in two ways are two rows."""
    return [replace(record, method=shown(record.method, record.question)) for record in records]


def is_reference(label: str) -> bool:
    """Whether a label, as it is or as it is shown, is that of what everything is compared with."""
    return method_of(label) == REFERENCE


def full_answers(records: Sequence[Record]) -> dict[Question, Record]:
    """Full attention's answers, by what was asked."""
    return {r.asked: r for r in records if is_reference(r.method) and r.status == "ok"}


def scores_of(records: Sequence[Record]) -> list[float]:
    """Scores of the prompts that have one, of one method: the mean over the scored answers to each.

    Several answers to a prompt are no samples of their own: what is drawn anew for an interval is the prompt.
    """
    scored = [record for record in records if record.score is not None]
    return [mean_score(answers) for answers in grouped(scored, lambda r: r.prompt).values()]


def mean_score(scored: Sequence[Record]) -> float:
    """The mean over answers that all have a score."""
    return sum(record.score or 0.0 for record in scored) / len(scored)


def agreement(tokens: Sequence[int], reference: Sequence[int], first: int = 1) -> float | None:
    """Share of the reference's tokens from place `first` on that stand at the same place.

    The token at place 0 is dense under every method, but where the question came after what the method took over.
    """
    counted = reference[first:]
    if not counted:
        return None
    pairs = zip(counted, [*tokens[first:], *[None] * len(reference)], strict=False)
    return sum(a == b for a, b in pairs) / len(counted)


def _task_score(method: str, length: int, task: str, records: list[Record]) -> TaskScore:
    scores = scores_of(records)
    low, high = interval_95([scores]) or (None, None)
    scored = sum(record.score is not None for record in records)
    return TaskScore(method, length, task, mean_of_means([scores]), low, high, scored, len(records))


def _row(label: str, length: int, records: list[Record], references: Mapping[Question, Record]) -> Row:
    good = [r for r in records if r.status == "ok"]
    agreements = [
        agreement(r.tokens, references[r.asked].tokens, int(r.question == IN_PROMPT))
        for r in good
        if r.asked in references
    ]
    tasks = [scores_of(found) for found in grouped(good, lambda r: r.task).values()]
    low, high = interval_95(tasks) or (None, None)
    cold = [r.prefill_s for r in good if r.reused_tokens == 0] or [r.prefill_s for r in good]
    steps = [ms for r in good if (ms := r.decode_ms_per_token) is not None]
    p10, p50, p90 = (percentile(steps, q) for q in (10, 50, 90))
    return Row(
        method=label,
        length=length,
        score=mean_of_means(tasks),
        score_low=low,
        score_high=high,
        scored=len(good),
        total=len(records),
        agreement=mean_of_known(agreements),
        prompt_tokens=mean_of_known([r.prompt_tokens for r in good]),
        attended_tokens=mean_of_known([r.attended_tokens for r in good]),
        device_bytes=mean_of_known([r.device_bytes for r in good]),
        host_bytes=mean_of_known([r.host_bytes for r in good]),
        bus_bytes=mean_of_known([r.bus_bytes for r in good]),
        prefill_s=percentile(cold, 50),
        build_s=percentile([r.build_s for r in good], 50),
        decode_ms_p10=p10,
        decode_ms_p50=p50,
        decode_ms_p90=p90,
    )
