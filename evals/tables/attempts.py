"""Several answers to a prompt, and how answers end: pass@k, cut off by the limit, cut off while thinking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

from evals.common.grouping import grouped
from evals.runs.results import Record
from evals.tables.statistics import interval_95, mean_of_means
from evals.tables.table import Table, number, tokens


@dataclass(frozen=True)
class PassRate:
    """pass@k of one method at one length; None where no prompt has k scored answers that are right or wrong."""

    method: str
    length: int
    k: int
    rate: float | None  # 0..1, mean over tasks of the mean over their prompts
    low: float | None  # 95 % bootstrap interval over prompts
    high: float | None
    prompts: int  # with at least k scored answers
    left_out: int  # with fewer


def pass_at(k: int, right: int, answers: int) -> float:
    """Chance that at least one of k answers, drawn from these without putting back, is right.

    The unbiased estimator of Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374).
    """
    if not 1 <= k <= answers:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} answers, not {answers}")
    return 1.0 - comb(answers - right, k) / comb(answers, k)


def pass_rates(records: Sequence[Record], right_or_wrong: Callable[[Record], bool]) -> list[PassRate]:
    """pass@1 and pass@K, K being the most answers that a prompt has, by method and length.

    None without drawn answers, and none of tasks whose answers may be partly right.
    """
    judged = [r for r in records if _is_drawn(r) and right_or_wrong(r)]
    if not judged:
        return []
    most = max(int(r.meta["answer"]) for r in judged)
    cells = grouped(judged, lambda r: (r.method, r.length))
    return [_rate(*cell, k, found) for cell, found in cells.items() for k in sorted({1, most})]


def attempt_tables(records: Sequence[Record], right_or_wrong: Callable[[Record], bool]) -> list[Table]:
    """Of runs that draw or think: pass@k where answers are right or wrong, and how answers ended."""
    rates = pass_rates(records, right_or_wrong)
    tables = [_pass_table(rates, sorted({r.task for r in records if right_or_wrong(r)}))] if rates else []
    told = [r for r in records if r.status == "ok" and (_is_drawn(r) or _thought(r))]
    return [*tables, _ends_table(told)] if told else tables


def _is_drawn(record: Record) -> bool:
    return "answer" in record.meta


def _thought(record: Record) -> bool:
    return "thought_tokens" in record.meta


def _is_cut(record: Record) -> bool:
    return not record.stopped or bool(record.meta.get("answer_cut"))


def _rate(method: str, length: int, k: int, records: Sequence[Record]) -> PassRate:
    by_task, left_out = list[list[float]](), 0
    for of_task in grouped(records, lambda r: r.task).values():
        scored = [[r.score for r in same if r.score is not None] for same in grouped(of_task, _prompt).values()]
        left_out += sum(len(scores) < k for scores in scored)
        by_task.append([pass_at(k, scores.count(1.0), len(scores)) for scores in scored if len(scores) >= k])
    low, high = interval_95(by_task) or (None, None)
    return PassRate(method, length, k, mean_of_means(by_task), low, high, sum(map(len, by_task)), left_out)


def _prompt(record: Record) -> tuple[str, int, str]:
    return record.prompt


def _pass_table(rates: Sequence[PassRate], tasks: Sequence[str]) -> Table:
    ks = list(dict.fromkeys(rate.k for rate in rates))
    lines = []
    for (method, length), held in grouped(rates, lambda rate: (rate.method, rate.length)).items():
        cells = [cell for rate in held for cell in (number(rate.rate, ".2f"), _interval(rate))]
        lines.append([method, tokens(length), str(held[0].prompts), *cells])
    without = sum(rate.left_out for rate in rates if rate.k == ks[-1])
    caption = (
        "The chance that one of k drawn answers is right: the unbiased estimate from each prompt's scored answers, "
        "mean over prompts, then over tasks, with a 95 % bootstrap interval over prompts. Only tasks whose answers are "
        f"right or wrong: {', '.join(tasks)}."
    )
    if without:
        caption += f" Prompts without {ks[-1]} scored answers are not in pass@{ks[-1]}: {without} over all rows."
    heads = [head for k in ks for head in (f"pass@{k}", "95 %")]
    return Table("Right at least once", ["method", "length", "prompts", *heads], lines, caption, names=2)


def _interval(rate: PassRate) -> str:
    return "–" if rate.low is None or rate.high is None else f"{rate.low:.2f}–{rate.high:.2f}"


def _ends_table(records: Sequence[Record]) -> Table:
    """How many answers a limit cut off, and of those that think, where."""
    thinking = any(map(_thought, records))
    lines = []
    for (method, length), held in grouped(records, lambda r: (r.method, r.length)).items():
        count = len(held)
        line = [method, tokens(length), f"{sum(map(_is_cut, held))} of {count}"]
        if thinking:
            thoughts = [int(r.meta["thought_tokens"]) for r in held if _thought(r)]
            cut = sum(bool(r.meta.get("thought_cut")) for r in held)
            line += [f"{cut} of {count}", number(sum(thoughts) / len(thoughts) if thoughts else None, ".0f")]
        lines.append(line)
    heads = ["cut off by the limit", *(["cut off while thinking", "thought tokens"] if thinking else [])]
    caption = "Answers that reached their longest length before they ended by themselves."
    if thinking:
        caption += (
            " A thought is not scored; where the limit cuts one off, no answer is left and an empty one is scored."
        )
    return Table("How answers ended", ["method", "length", *heads], lines, caption, names=2)
