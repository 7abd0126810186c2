"""What every benchmark hands to the runner: questions, prompts as token ids, and how an answer is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from evals.common.asking.drawing import Draw
from evals.common.asking.question import IN_PROMPT
from evals.common.asking.thoughts import Thinking
from evals.runs.forced.forcing import Forcing

if TYPE_CHECKING:
    from shadowkv.engine.sampling import Choose


class Question(NamedTuple):
    """What names a prompt of a benchmark for good, whatever else is run. Known before the prompt is made."""

    task: str
    length_tokens: int  # the length asked for
    sample: str
    place: str = IN_PROMPT  # where the question stands, in-prompt or after


@dataclass(frozen=True)
class Example:
    """One prompt."""

    benchmark: str
    task: str
    length_tokens: int
    sample: str
    input_ids: tuple[int, ...] = field(repr=False)
    references: tuple[str, ...]
    max_new_tokens: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()  # tokens that end this answer besides the model's own
    min_new_tokens: int = 0  # no stop token is taken before this many
    continuation: tuple[int, ...] = field(default=(), repr=False)  # what follows in the text, where this is one
    # Turns that go on in the same cache, their tokens being fed after the answers so far.
    later: tuple[Example, ...] = ()
    draw: Draw | None = None  # how tokens are drawn; None for the most likely ones
    thinking: Thinking | None = None  # how a thought before the answer is told from it
    again: tuple[Example, ...] = ()  # what is answered instead, each in a cache of its own, from this one prompt
    # -> index of the token at which the question begins, looked for only where it matters; None where nobody knows.
    # Raises `SkvError` where it cannot be found.
    asked_from: Callable[[], int] | None = field(default=None, repr=False, compare=False)
    place: str = IN_PROMPT
    before: tuple[int, ...] = field(default=(), repr=False)  # tokens of the same prompt that an earlier turn has fed

    @property
    def question(self) -> Question:
        return Question(self.task, self.length_tokens, self.sample, self.place)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The whole prompt, wherever its question stands."""
        return (*self.before, *self.input_ids)

    @property
    def turns(self) -> tuple[Example, ...]:
        """This prompt and the turns after it. One without references is fed and not answered."""
        return (self, *self.later)

    @property
    def attempts(self) -> tuple[Example, ...]:
        """What is to be answered of this prompt: itself, or several answers to it."""
        return self.again or (self,)

    def chooser(self) -> Choose:
        """What picks the tokens of this turn's answer."""
        from shadowkv.engine.sampling import most_likely  # here, so that comparing runs needs no torch

        return most_likely if self.draw is None else self.draw.chooser()

    @property
    def questions(self) -> tuple[Question, ...]:
        """What is asked, in order."""
        return tuple(turn.question for turn in self.turns if turn.references or turn.continuation)

    @property
    def fed(self) -> tuple[int, ...] | None:
        """Tokens between the prompt and its one answer; None where there are several answers."""
        if len(self.questions) != 1 or not self.turns[-1].references:
            return None
        return tuple(token for turn in self.later for token in turn.input_ids)


class Task(ABC):
    """A benchmark with its settings."""

    @property
    @abstractmethod
    def benchmark(self) -> str:
        """What records, tables and run.json call it."""

    @abstractmethod
    def questions(self, tokenizer: Any) -> Sequence[Question]:
        """All there is to ask, in canonical order. Raises `SkvError` where a prompt could not be made."""

    @abstractmethod
    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        """Prompts of the wanted questions (all by default), made one by one, in the order they are best run in.

        The same seed gives the same prompts, whichever subset is wanted.
        """

    def prompt_of(self, question: Question) -> Hashable:
        """The same for questions that one prompt answers, or that share their context."""
        return question

    @abstractmethod
    def score(self, example: Example, prediction: str) -> float:
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

    @abstractmethod
    def chat_answer_tokens(self) -> Collection[int]:
        """How many tokens answers to prompts in the chat template may have; none where no prompt is put into it."""

    @property
    def forced(self) -> Forcing | None:
        """How much of a continuation methods are fed instead of answering; None where they answer."""
        return None

    def needs(self) -> tuple[str, ...]:
        """Packs that must have been pulled before anything is asked."""
        return ()

    def notes(self) -> list[str]:
        """What every table of this task must say."""
        return []

    def notes_after(self) -> list[str]:
        """What every table must say besides where questions come after the text: what counts as one.

        Raises `SkvError` where it is not known where they begin.
        """
        return []

    def left_out(self, tokenizer: Any) -> dict[str, str]:
        """Tasks that were asked for and are not among the questions, with the reason why each cannot be run here."""
        return {}
