"""A task whose prompts are answered several times, by drawing: each answer is a question of its own."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evals.common.asking.drawing import Draw, answer_name, prompt_name
from evals.runs.task import Example, Question
from evals.runs.wrapping.wrapped import WrappedTask
from shadowkv.common.errors import SkvError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, and how many to each prompt."""

    temperature: float
    top_p: float = 1.0
    answers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise SkvError(f"--temperature must be a number above 0, or 0 for greedy answers, got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise SkvError(f"--top-p must be above 0 and at most 1, which leaves no token out, got {self.top_p:g}")
        if self.answers < 1:
            raise SkvError(f"--answers must be at least 1, got {self.answers}")

    @property
    def described(self) -> str:
        """In words, for tables."""
        count = "one answer" if self.answers == 1 else f"{self.answers} answers"
        drawing = f"temperature {self.temperature:g}, top-p {self.top_p:g}, sampling seed {self.seed}"
        told = "" if self.answers == 1 else ", averaged per prompt before anything else"
        return f"{count} per prompt{told}, drawn at {drawing}; every method gets the same random numbers"

    def draw(self, benchmark: str, question: Question, number: int) -> Draw:
        """For one answer: the same in any run, order, batch and process."""
        return Draw(self.temperature, self.top_p, ("answer", self.seed, benchmark, *question, number))


@dataclass(frozen=True)
class SampledTask(WrappedTask):
    """Every prompt of `task`, answered `sampling.answers` times. Of several turns, each goes on from its own answer."""

    sampling: Sampling

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        return [_numbered(q, n) for q in self.task.questions(tokenizer) for n in self._numbers]

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        asked = None if wanted is None else list(dict.fromkeys(map(_prompt, wanted)))
        for example in self.task.examples(tokenizer, asked):
            yield replace(example, again=tuple(self._attempt(example, number) for number in self._numbers))

    def prompt_of(self, question: Question) -> Hashable:
        return self.task.prompt_of(_prompt(question))

    def config(self) -> dict[str, Any]:
        own = self.sampling
        drawing = {
            "temperature": own.temperature,
            "top_p": own.top_p,
            "answers": own.answers,
            "sampling_seed": own.seed,
        }
        return {**self.task.config(), "sampling": drawing}

    def notes(self) -> list[str]:
        return [self.sampling.described, *self.task.notes()]

    @property
    def _numbers(self) -> range:
        return range(1, self.sampling.answers + 1)

    def _attempt(self, turn: Example, number: int) -> Example:
        return replace(
            turn,
            sample=answer_name(turn.sample, number),
            meta={**turn.meta, "answer": number},
            draw=self.sampling.draw(self.benchmark, turn.question, number),
            later=tuple(self._attempt(later, number) for later in turn.later),
        )


def _numbered(question: Question, number: int) -> Question:
    return question._replace(sample=answer_name(question.sample, number))


def _prompt(question: Question) -> Question:
    return question._replace(sample=prompt_name(question.sample))
