"""Prompts out of running text, and the text's own continuation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evals.fidelity.books import Books, Shelf, read_books
from evals.runs.task import Example, Question, Task
from shadowkv.common.errors import SkvError

TASK = "text"


@dataclass(frozen=True)
class RunningText(Task):
    """`samples` prompts of each of these lengths in tokens, and `forced_tokens` that follow each in its text."""

    benchmark = "fidelity"

    lengths: tuple[int, ...]
    forced_tokens: int = 64
    samples: int = 8
    data: str = "essays"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise SkvError(f"--samples must be at least 1, got {self.samples}")

    @cached_property
    def _books(self) -> Books:
        return read_books(self.data)

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        shelf, longest = Shelf(self._books, tokenizer, self.seed), max(self.lengths)
        apart = shelf.apart(self.samples, longest, self.forced_tokens + 1)
        if apart < self.samples:
            raise SkvError(
                f"{self._books.name} holds {apart} prompts of {longest} tokens that do not overlap, and --samples asks "
                f"for {self.samples}: ask for fewer, for shorter ones, or give more text (--data)"
            )
        return [Question(TASK, length, str(number)) for number in range(self.samples) for length in self.lengths]

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        shelf = Shelf(self._books, tokenizer, self.seed)
        asked = self.questions(tokenizer) if wanted is None else wanted
        made = [self._made(tokenizer, shelf, question) for question in asked]
        return iter(sorted(made, key=lambda example: example.input_ids))

    def _made(self, tokenizer: Any, shelf: Shelf, question: Question) -> Example:
        window = shelf.window(int(question.sample), question.length_tokens, self.forced_tokens + 1)
        return Example(
            benchmark=self.benchmark,
            task=TASK,
            length_tokens=question.length_tokens,
            sample=question.sample,
            input_ids=window.prompt,
            references=(str(tokenizer.decode(window.continuation)),),
            max_new_tokens=self.forced_tokens,
            meta={"book": window.book, "start": window.start},
            continuation=window.continuation,
        )

    def score(self, example: Example, prediction: str) -> float:
        raise NotImplementedError("text is forced, not answered")

    def chat_answer_tokens(self) -> Collection[int]:
        return ()

    def config(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def selection(self) -> dict[str, Any]:
        return {"lengths": self.lengths, "samples": self.samples}

    def sources(self) -> dict[str, Any]:
        books = self._books
        return {"text": {"name": books.name, "version": books.version, "sha256": books.sha256}}

    def needs(self) -> tuple[str, ...]:
        return ("essays",) if self.data == "essays" else ()

    def notes(self) -> list[str]:
        return []
