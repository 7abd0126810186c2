"""Two accuracy runs: answers to the same prompts, paired and judged cell by cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import NamedTuple

import numpy as np

from evals.common.asking.question import IN_PROMPT, shown
from evals.common.grouping import grouped
from evals.compare.gate import ACCURACY, MEMORY, Gate
from evals.compare.paired import Paired
from evals.compare.rows import Comparison, RatioRow, ScoreRow
from evals.compare.sides import (
    Side,
    differing_circumstances,
    refuse_other_questions,
    same_bytes,
    shared_methods,
)
from evals.compare.verdicts import Decision, Verdict, decide, judge_range
from evals.runs.results import Key, Record
from evals.tables.statistics import mean_of_means
from evals.tables.summary import mean_score
from evals.tables.table import tokens
from shadowkv.common.errors import SkvError


class _Cell(NamedTuple):
    task: str
    length: int
    question: str  # where it stands

    @property
    def place(self) -> str:
        return shown(f"{self.task} @ {tokens(self.length)}", self.question)


@dataclass(frozen=True)
class _Answers:
    """One cell of one method: its answers in both runs."""

    pairs: Sequence[tuple[Record, Record]]  # scored in both
    lost: int
    found: int

    @property
    def prompts(self) -> list[tuple[list[Record], list[Record]]]:
        """The pairs by prompt: several answers to one are no samples of their own, and are averaged first."""
        found = grouped(self.pairs, lambda pair: pair[0].prompt).values()
        return [([before for before, _ in same], [after for _, after in same]) for same in found]

    @property
    def before(self) -> list[float]:
        return [mean_score(before) for before, _ in self.prompts]

    @property
    def after(self) -> list[float]:
        return [mean_score(after) for _, after in self.prompts]

    @property
    def differences(self) -> list[float]:
        return [after - before for before, after in zip(self.before, self.after, strict=True)]

    @property
    def changed(self) -> int:
        """Prompts, any of whose answers is another text."""
        return sum([r.prediction for r in before] != [r.prediction for r in after] for before, after in self.prompts)


def compare_answers(baseline: Side[Record], current: Side[Record], gate: Gate) -> Comparison:
    """Compare two runs of one benchmark. Raises `SkvError` where they are not of the same questions."""
    notes: list[str] = []
    baseline, current = (_with_numbers(side, notes) for side in (baseline, current))
    refuse_other_questions(baseline, current)
    methods = shared_methods(baseline, current, notes)
    cells = _answers(baseline, current, methods, notes)
    notes += differing_circumstances(baseline, current)
    sizes = _sizes(cells, gate) if same_bytes(baseline, current) else []
    return Comparison(
        baseline.described, current.described, current.manifest.title, gate, _scores(cells, gate), sizes, notes
    )


def _with_numbers(side: Side[Record], notes: list[str]) -> Side[Record]:
    """The side with its scores checked: one that is not a number is no score."""
    for record in side.records:
        score = record.score
        if score is not None and (not isinstance(score, int | float) or not (0 <= score <= 1 or not isfinite(score))):
            raise SkvError(f"{side.name} {side.path}: {record.key} has the score {score!r}; scores are 0 to 1 or null")
    nowhere = sum(record.score is not None and not isfinite(record.score) for record in side.records)
    if nowhere:
        notes.append(f"{side.name}: {nowhere} scores are not numbers and count as unscored")
    records = [r if r.score is None or isfinite(r.score) else replace(r, score=None) for r in side.records]
    return replace(side, records=records)


def _answers(
    baseline: Side[Record], current: Side[Record], methods: Sequence[str], notes: list[str]
) -> dict[str, dict[_Cell, _Answers]]:
    """By method and cell. An answer that nobody asked the current run for is not lost, only left out and noted."""
    before, after = (_of_methods(side, methods) for side in (baseline, current))
    if not before.keys() & after.keys():
        raise SkvError(f"no sample in common: {_example(baseline)}; {_example(current)}")
    selected = baseline.manifest.selection == current.manifest.selection
    alike = selected and _asked(baseline) == _asked(current)
    for side, own, other in ((baseline, before, after), (current, after, before)):
        alone = grouped(own.keys() - other.keys(), lambda key: key.question)
        for question, keys in alone.items() if not (alike and side is baseline) else ():
            notes.append(f"{len(keys)} answers{_where(question)} are only in {side.name} and left out")
    found: dict[str, dict[_Cell, _Answers]] = {method: {} for method in methods}
    asked = [key for key in before if alike or key in after]
    for (method, cell), keys in grouped(asked, _method_and_cell).items():
        scored_before = [key for key in keys if before[key].score is not None]
        scored_after = {key for key in keys if key in after and after[key].score is not None}
        pairs = [(before[key], after[key]) for key in scored_before if key in scored_after]
        lost, gained = len(scored_before) - len(pairs), len(scored_after) - len(pairs)
        found[method][cell] = _Answers(pairs, lost, gained)
    if alike and (missing := len(before.keys() - after.keys())):
        notes.append(f"{current.name} does not hold {missing} of the {len(before)} answers that it was asked for")
    return {method: cells for method, cells in found.items() if cells}


def _method_and_cell(key: Key) -> tuple[str, _Cell]:
    return key.method, _Cell(key.task, key.length, key.question)


def _asked(side: Side[Record]) -> str:
    return str(side.manifest.config.get("question", IN_PROMPT))


def _where(question: str) -> str:
    return "" if question == IN_PROMPT else f" with the question {question}"


def _of_methods(side: Side[Record], methods: Sequence[str]) -> dict[Key, Record]:
    return {record.key: record for record in side.records if record.method in methods}


def _example(side: Side[Record]) -> str:
    first = side.records[0]
    return (
        f"{side.name} holds {len(side.records)} answers{_where(first.question)}, such as "
        f"{first.task} @ {first.length} {first.sample}"
    )


def _scores(cells: Mapping[str, Mapping[_Cell, _Answers]], gate: Gate) -> list[ScoreRow]:
    """Averages of every method that has several cells, then the cells; all of them share the error rate."""
    averages = [
        (method, shown(f"mean of {len(alike)} cells", question), [held[cell] for cell in alike])
        for method, held in cells.items()
        for question, alike in grouped(held, lambda cell: cell.question).items()
        if len(alike) > 1
    ]
    single = [(method, cell.place, [answers]) for method, held in cells.items() for cell, answers in held.items()]
    groups = [*averages, *single]
    found = [Paired([a.differences for a in answers if a.pairs]) for _, _, answers in groups]
    alike = [
        not paired.wins and not paired.losses and not any(a.changed for a in answers)
        for paired, (_, _, answers) in zip(found, groups, strict=True)
    ]
    decisions = decide(found, alike, gate.tolerances[ACCURACY])
    return [
        _score_row(method, place, answers, paired, decision)
        for (method, place, answers), paired, decision in zip(groups, found, decisions, strict=True)
    ]


def _score_row(method: str, place: str, answers: Sequence[_Answers], paired: Paired, decision: Decision) -> ScoreRow:
    lost, interval = sum(a.lost for a in answers), paired.interval
    if lost:
        decision = decision._replace(verdict=Verdict.WORSE, more_needed=None, why=f"{lost} answers lost")
    return ScoreRow(
        metric=ACCURACY,
        method=method,
        place=place,
        verdict=decision.verdict,
        more_needed=decision.more_needed,
        why=decision.why,
        samples=paired.samples,
        before=mean_of_means([a.before for a in answers]),
        after=mean_of_means([a.after for a in answers]),
        difference=paired.difference,
        low=interval and interval[0],
        high=interval and interval[1],
        wins=paired.wins,
        losses=paired.losses,
        changed=sum(a.changed for a in answers),
        lost=lost,
        found=sum(a.found for a in answers),
        p=decision.p,
        p_holm=decision.p_holm,
    )


def _sizes(cells: Mapping[str, Mapping[_Cell, _Answers]], gate: Gate) -> list[RatioRow]:
    """KV bytes by method and length: counted, not measured, so the same prompts give the same ones."""
    rows = []
    for method, held in cells.items():
        by_place = grouped(held, lambda cell: (cell.question != IN_PROMPT, cell.length, cell.question))
        for (_, length, question), alike in sorted(by_place.items()):
            pairs = [pair for cell in alike for pair in held[cell].pairs]
            for what, before, after in (
                ("KV on device", [b.device_bytes for b, _ in pairs], [a.device_bytes for _, a in pairs]),
                ("KV on host", [b.host_bytes for b, _ in pairs], [a.host_bytes for _, a in pairs]),
            ):
                rows += size_row(method, shown(f"@ {tokens(length)}", question), what, before, after, gate)
    return rows


def size_row(
    method: str, place: str, what: str, before: Sequence[float], after: Sequence[float], gate: Gate
) -> list[RatioRow]:
    """The row of bytes in pairs; none where there are none in either run."""
    if not any(before) and not any(after):
        return []
    ratios = [b / a if a else (float("inf") if b else 1.0) for a, b in zip(before, after, strict=True)]
    low, high = min(ratios), max(ratios)
    return [
        RatioRow(
            metric=MEMORY,
            method=method,
            place=place,
            verdict=judge_range(low, high, gate.tolerances[MEMORY]),
            more_needed=None,
            why="",
            what=what,
            before=float(np.mean(before)),
            after=float(np.mean(after)),
            ratio=float(np.median(ratios)),
            low=low,
            high=high,
            spread_before=None,
            spread_after=None,
            repeats=len(ratios),
            p=None,
            p_holm=None,
        )
    ]
