"""A benchmark whose questions stand elsewhere: after the text that a method takes over, or in both places.

A method that judges by the last queries of a prompt (SnapKV and its kin) knows what will be asked where the question is
part of that prompt. After the text it does not, as in a conversation about a document that was read before.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evals.common.asking.question import AFTER, BOTH, IN_PROMPT, check_place
from evals.common.grouping import grouped
from evals.runs.task import Example, Question, Task
from evals.runs.wrapping.wrapped import WrappedTask
from shadowkv.common.errors import SkvError

_AFTER = (
    "the text alone is what methods take over; question, answer prefix and answer go through their cache, so the first "
    "token of an answer is the method's own, and agree counts it"
)
_NOTES = {
    AFTER: f"question after: {_AFTER}",
    BOTH: f"questions stand in the prompt and, in rows named so, after it: there {_AFTER}",
}


def asking(task: Task, place: str) -> Task:
    """The benchmark with its questions at `place`: the task itself in the prompt."""
    return task if check_place(place) == IN_PROMPT else Placed(task, place)


def asked_after(example: Example) -> Example:
    """The same prompt with its text as the first turn and its question, with all that follows it, as the next one.

    Raises `SkvError` where nobody knows where the question begins, or where nothing stands before it.
    """
    where = f"{example.benchmark} {example.task} {example.sample}"
    if example.asked_from is None:
        raise SkvError(f"--question after: {where} does not say where its question begins")
    first = example.asked_from()
    if not 0 < first < len(example.input_ids):
        raise SkvError(f"--question after: {where} does not hold a text and, whole and behind it, a question")
    text, question = example.input_ids[:first], example.input_ids[first:]
    asked = replace(example, input_ids=question, later=(), place=AFTER, before=text)
    later = [replace(turn, place=AFTER) for turn in example.later]
    return replace(example, input_ids=text, references=(), later=(asked, *later), place=AFTER)


@dataclass(frozen=True)
class Placed(WrappedTask):
    """A task whose questions come after the text, or both in the prompt and after it: each is then asked twice."""

    place: str

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        self.task.notes_after()  # raises where that cannot be asked
        places = (IN_PROMPT, AFTER) if self.place == BOTH else (AFTER,)
        return [question._replace(place=place) for question in self.task.questions(tokenizer) for place in places]

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        asked = list(self.questions(tokenizer) if wanted is None else wanted)
        whole, asked_set = grouped(asked, _in_prompt), set(asked)
        # One after the other, so that the engine keeps the text of the first for the second.
        for example in self.task.examples(tokenizer, list(whole)):
            for place in (IN_PROMPT, AFTER):
                if any(question._replace(place=place) in asked_set for question in example.questions):
                    yield example if place == IN_PROMPT else asked_after(example)

    def prompt_of(self, question: Question) -> Hashable:
        return self.task.prompt_of(_in_prompt(question))

    def config(self) -> dict[str, Any]:
        return {**self.task.config(), "question": self.place}

    def notes(self) -> list[str]:
        return [*self.task.notes(), _NOTES[self.place], *self.task.notes_after()]


def _in_prompt(question: Question) -> Question:
    return question._replace(place=IN_PROMPT)
