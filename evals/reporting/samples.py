"""Answers for the sample browser of a page: columns of numbers into lists of texts, so that 50,000 open at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from evals.common.asking.question import shown
from evals.reporting.folders import Run
from evals.reporting.visible import visible
from evals.runs.results import Record
from evals.tables.summary import full_answers

PREDICTION_CHARS = 2000
_PROMPT_CHARS = 1200
_REFERENCE_CHARS = 400
_REFERENCES = 20


class _Texts:
    """Every text once, by its place."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))

    def all(self) -> list[str]:
        return list(self.places)


def samples_of(runs: Iterable[Run]) -> dict[str, Any]:
    """What the browser shows, ready for JSON.

    A row: run, task, length, method, sample, prompt, references, score (null: unscored), place of the first token that
    is not full attention's (0: none, null: unknown), its token and full attention's there, tokens, prediction (the
    error of a failed answer), score less full attention's (null: unknown).
    """
    names, tasks, methods, samples, prompts, references = (_Texts() for _ in range(6))
    rows = []
    for run in runs:
        full = full_answers(run.answers)
        for record in run.answers:
            reference = full.get(record.asked)
            place, token, theirs = first_difference(record, reference)
            gain = None if reference is None or None in (record.score, reference.score) else _gain(record, reference)
            said = record.prediction if record.status == "ok" else f"{record.status}: {record.error}"
            rows.append(
                [
                    names.place(run.name),
                    tasks.place(visible(record.task, _REFERENCE_CHARS)),
                    record.length,
                    methods.place(visible(shown(record.method, record.question), _REFERENCE_CHARS)),
                    samples.place(visible(record.sample, _REFERENCE_CHARS)),
                    prompts.place(visible(record.prompt_tail or "", _PROMPT_CHARS)),
                    references.place(_listed(record.references)),
                    record.score,
                    place,
                    token,
                    theirs,
                    len(record.tokens),
                    visible(said, PREDICTION_CHARS),
                    gain,
                ]
            )
    texts = {"runs": names, "tasks": tasks, "methods": methods, "samples": samples, "prompts": prompts}
    return {**{name: found.all() for name, found in texts.items()}, "references": references.all(), "rows": rows}


def first_difference(record: Record, full: Record | None) -> tuple[int | None, int | None, int | None]:
    """Where an answer leaves full attention's: the place of the token, counted from 1, the token, and the other one.

    (0, None, None) where both are the same; (None, None, None) where there is nothing to compare. A token is None where
    an answer has ended.
    """
    if full is None or record.status != "ok":
        return None, None, None
    mine, theirs = record.tokens, full.tokens
    for place in range(max(len(mine), len(theirs))):
        here, there = (tokens[place] if place < len(tokens) else None for tokens in (mine, theirs))
        if here != there:
            return place + 1, here, there
    return 0, None, None


def _gain(record: Record, reference: Record) -> float:
    return round((record.score or 0.0) - (reference.score or 0.0), 6)


def _listed(references: Sequence[str]) -> str:
    shown = [visible(text, _REFERENCE_CHARS) for text in references[:_REFERENCES]]
    more = len(references) - len(shown)
    return "\n".join(shown) + (f"\n… ({more} more)" if more > 0 else "")
