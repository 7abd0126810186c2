"""What every benchmark hands to the runner: prompts as token ids, and how an answer is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Example:
    """One prompt. (benchmark, task, length_tokens, sample) names it for good, whatever else is run."""

    benchmark: str
    task: str
    length_tokens: int  # the length asked for; the prompt never exceeds it
    sample: str
    input_ids: tuple[int, ...] = field(repr=False)
    references: tuple[str, ...]
    max_new_tokens: int
    meta: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A benchmark's task with its settings."""

    benchmark: ClassVar[str]

    @abstractmethod
    def examples(self, tokenizer: Any) -> Sequence[Example]:
        """Every prompt, in canonical order; the same seed gives the same prompts."""

    @abstractmethod
    def score(self, prediction: str, references: Sequence[str]) -> float:
        """How right a prediction is, from 0 to 1."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Settings that change a number: a run folder holds one value of each."""

    @abstractmethod
    def selection(self) -> dict[str, Any]:
        """Settings that only choose which numbers are made: a run folder may grow by them."""

    @abstractmethod
    def sources(self) -> dict[str, Any]:
        """What the prompts were made from, with versions and checksums, for run.json."""

    def notes(self) -> list[str]:
        """What every table of this task must say."""
        return []
