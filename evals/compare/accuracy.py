"""Two accuracy runs: answers to the same prompts, paired and judged cell by cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import NamedTuple

import numpy as np

from evals.common.grouping import grouped
from evals.common.question import IN_PROMPT, shown
from evals.compare.gate import ACCURACY, MEMORY, Gate
from evals.compare.paired import Paired
from evals.compare.rows import Comparison, RatioRow, ScoreRow
from evals.compare.sides import Side, other_parameters, refuse, refuse_different
from evals.compare.verdicts import Decision, Verdict, decide, judge_range
from evals.runs.results import Key, Record
from evals.tables.statistics import mean_of_means
from evals.tables.table import tokens
from shadowkv.common.errors import SkvError

# How a prefill is cut into chunks changes rounding only, and follows the device. Where questions stand is a part of
# every answer's key: only answers that were asked for alike are paired.
_MAY_DIFFER = frozenset({"config.prefill_chunk_tokens", "config.streamed", "config.question"})


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
    def differences(self) -> list[float]:
        return [_score(after) - _score(before) for before, after in self.pairs]

    @property
    def changed(self) -> int:
        return sum(before.prediction != after.prediction for before, after in self.pairs)


def compare_answers(baseline: Side[Record], current: Side[Record], gate: Gate) -> Comparison:
    """Compare two runs of one benchmark. Raises `SkvError` where they are not of the same questions."""
    notes: list[str] = []
    baseline, current = (_with_numbers(side, notes) for side in (baseline, current))
    _refuse(baseline, current)
    methods = _shared_methods(baseline, current, notes)
    cells = _answers(baseline, current, methods, notes)
    notes += _differing_circumstances(baseline, current)
    sizes = _sizes(cells, gate) if _same_bytes(baseline, current) else []
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


def _refuse(baseline: Side[Record], current: Side[Record]) -> None:
    refuse_different(baseline.manifest, current.manifest, _MAY_DIFFER)
    refuse(other_parameters(baseline.manifest, current.manifest))
    before, after = (_lengths(side) for side in (baseline, current))
    refuse([] if before == after else [f"lengths: {before} -> {after}"])
    prompts = {record.key: record.prompt_sha256 for record in baseline.records}
    other = [r for r in current.records if r.key in prompts and prompts[r.key] != r.prompt_sha256]
    if other:
        first = f"{other[0].task} @ {other[0].length} {other[0].sample}"
        refuse([f"prompts: {len(other)} samples have another prompt_sha256, the first is {first}"])


def _lengths(side: Side[Record]) -> list[int]:
    """Of what was asked, and of what is there: a run may have been stopped, or have grown."""
    return sorted({*side.manifest.selection.get("lengths", ()), *(record.length for record in side.records)})


def _shared_methods(baseline: Side[Record], current: Side[Record], notes: list[str]) -> list[str]:
    """Methods in both, in the baseline's order. Of a method only one side has, nothing can be said."""
    before, after = baseline.manifest.methods, current.manifest.methods
    shared = [label for label in before if label in after]
    if not shared:
        raise SkvError(
            f"no method in common: {baseline.name} has {', '.join(before)}; {current.name} {', '.join(after)}"
        )
    for side, names in ((baseline, before.keys() - after.keys()), (current, after.keys() - before.keys())):
        if names:
            notes.append(f"only in {side.name}: {', '.join(sorted(names))}")
    return shared


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


def _differing_circumstances(baseline: Side[Record], current: Side[Record]) -> list[str]:
    """What may change answers without being anybody's regression; and what tables of either run must say."""
    notes = []
    for key, matters in (
        ("name", ""),
        ("dtype", "; KV bytes are not compared"),
        ("device", "; KV bytes are not compared"),
    ):
        before, after = (side.manifest.model.get(key) for side in (baseline, current))
        if before != after:
            notes.append(f"model.{key} differs: {before} -> {after}{matters}")
    said = {f"{side.name}: {note}" for side in (baseline, current) for note in side.manifest.notes}
    return [*notes, *sorted(said)]


def _same_bytes(baseline: Side[Record], current: Side[Record]) -> bool:
    """Whether KV bytes compare: another type of numbers holds other bytes, and a GPU keeps other things on itself."""
    return all(baseline.manifest.model.get(k) == current.manifest.model.get(k) for k in ("dtype", "device"))


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
        before=mean_of_means([[_score(before) for before, _ in a.pairs] for a in answers]),
        after=mean_of_means([[_score(after) for _, after in a.pairs] for a in answers]),
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


def _score(record: Record) -> float:
    assert record.score is not None
    return record.score
