"""A task inside another: what it asks stays as it is, and what is done with an answer may change."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evals.runs.task import Example, Question, Task


@dataclass(frozen=True)
class WrappedTask(Task):
    """Passes everything on; subclasses change what they are for."""

    task: Task

    @property
    def benchmark(self) -> str:
        return self.task.benchmark

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        return self.task.questions(tokenizer)

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        return self.task.examples(tokenizer, wanted)

    def prompt_of(self, question: Question) -> Hashable:
        return self.task.prompt_of(question)

    def score(self, example: Example, prediction: str) -> float:
        return self.task.score(example, prediction)

    def config(self) -> dict[str, Any]:
        return self.task.config()

    def selection(self) -> dict[str, Any]:
        return self.task.selection()

    def sources(self) -> dict[str, Any]:
        return self.task.sources()

    def chat_answer_tokens(self) -> Collection[int]:
        return self.task.chat_answer_tokens()

    def needs(self) -> tuple[str, ...]:
        return self.task.needs()

    def notes(self) -> list[str]:
        return self.task.notes()

    def left_out(self, tokenizer: Any) -> dict[str, str]:
        return self.task.left_out(tokenizer)
