"""RULER as a benchmark: lengths x tasks x samples, made to measure for a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import Any, NamedTuple

from evals.common.asking.question import first_character, first_token
from evals.common.chat import Chat
from evals.common.seeding import seeded
from evals.ruler.families.family import Workshop
from evals.ruler.families.fitting import Draft, fit, too_short
from evals.ruler.materials import Materials, PulledMaterials
from evals.ruler.own_materials import OwnMaterials
from evals.ruler.tasks import TASKS, find_profile
from evals.runs.task import Example, Question, Task
from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean

DEFAULT_LENGTHS = tuple(1024 * k for k in (4, 8, 16, 32, 64, 128))
BRIEF_LENGTHS, BRIEF_SAMPLES = (1024,), 2  # what two cores run in minutes
_WORDINGS: dict[str, Callable[[str | None], Materials]] = {"official": PulledMaterials, "own": OwnMaterials}
# From here on, the documents that come with a question are hardly ever too long (HotpotQA's take at most 3.7k tokens of
# SmolLM2's; in single bytes, 7 % of them do not fit), so how many questions fit is not counted beforehand.
_QUESTIONS_FIT_TOKENS = 8192
_FULL = 0.9  # a prompt that cannot fill this share of its length is not that task at that length


class Made(NamedTuple):
    """A prompt in all its forms."""

    example: Example
    text: str  # without the answer prefix
    question: str


class RulerTask(Task):
    """What generated prompts and prompts from files have in common."""

    benchmark = "ruler"
    profile: str

    def score(self, example: Example, prediction: str) -> float:
        return find_profile(self.profile).metrics[example.task](prediction, example.references)


@dataclass(frozen=True)
class Ruler(RulerTask):
    """Settings of a RULER run; lengths in tokens, generated tokens included."""

    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    samples: int
    profile: str = "nvidia"
    wording: str = "official"
    haystack_spec: str | None = None
    seed: int = 0
    thinking: str = "auto"

    def __post_init__(self) -> None:
        find_profile(self.profile)
        if self.samples < 1:
            raise SkvError(f"--samples must be at least 1, got {self.samples}")
        if self.wording not in _WORDINGS:
            known = ", ".join(_WORDINGS)
            raise SkvError(f"unknown wording '{self.wording}'{did_you_mean(self.wording, _WORDINGS)}; one of {known}")

    @cached_property
    def materials(self) -> Materials:
        return _WORDINGS[self.wording](self.haystack_spec)

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        maker = _Maker(self, tokenizer)
        why_not = self._why_not(maker)
        cells = [(task, n) for n in self.lengths for task in self.tasks if (task, n) not in why_not]
        if not cells:
            (task, length), reason = next(iter(why_not.items()))
            raise SkvError(f"none of the tasks can be run; {task} at {length}: {reason}")
        for task, length in cells:
            maker.check(task, length)
        return [Question(task, length, f"sample={i}") for task, length in cells for i in range(self.samples)]

    def left_out(self, tokenizer: Any) -> dict[str, str]:
        why_not = self._why_not(_Maker(self, tokenizer))
        return {f"{task} at {length}": reason for (task, length), reason in why_not.items()}

    def _why_not(self, maker: _Maker) -> dict[tuple[str, int], str]:
        """Tasks that cannot fill a length, with the reason."""
        reasons = {(task, length): maker.unfilled(task, length) for length in self.lengths for task in self.tasks}
        return {cell: reason for cell, reason in reasons.items() if reason}

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        return (made.example for made in self.made(tokenizer, wanted))

    def prompts(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[tuple[Example, str]]:
        """Examples with their prompts as text: chat template and message, without the answer prefix."""
        return (made[:2] for made in self.made(tokenizer, wanted))

    def made(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Made]:
        """`prompts`, with the question that each ends with."""
        maker = _Maker(self, tokenizer)
        for question in self.questions(tokenizer) if wanted is None else wanted:
            yield maker.prompt(question)

    def chat_answer_tokens(self) -> Collection[int]:
        return [TASKS[task].max_new_tokens for task in self.tasks]

    def config(self) -> dict[str, Any]:
        return {"profile": self.profile, "seed": self.seed}

    def selection(self) -> dict[str, Any]:
        return {"lengths": self.lengths, "tasks": self.tasks, "samples": self.samples}

    def sources(self) -> dict[str, Any]:
        return {"ruler": self.materials.described()}

    def needs(self) -> tuple[str, ...]:
        return ("ruler",) if self.wording == "official" else ()

    def notes(self) -> list[str]:
        return [*self.materials.notes(), *self._samples_notes(), *profile_notes(self.profile)]

    def _samples_notes(self) -> list[str]:
        whole = find_profile(self.profile).samples
        if self.samples >= whole:
            return []
        return [f"{self.samples} of the benchmark's {whole} samples per task; its own number takes --samples {whole}"]


class _Maker:
    """Prompts of one run for one tokenizer."""

    def __init__(self, run: Ruler, tokenizer: Any) -> None:
        self._run = run
        self._tokenizer = tokenizer
        self._chat = Chat(tokenizer, run.thinking)
        self._templated = self._chat.templated
        self._shop = Workshop(run.materials, lambda text: len(self._chat.ids(text)), run.seed)
        self._usable: dict[tuple[str, int], list[int]] = {}

    def check(self, task: str, length: int) -> None:
        """Raise `SkvError` if this task cannot be asked at this length, or not that many times."""
        available = TASKS[task].count(self._shop)
        if available is not None and self._run.samples > available:
            raise SkvError(f"--samples {self._run.samples} is more than the {available} questions of {task}")
        if available is not None and length < _QUESTIONS_FIT_TOKENS:
            self._number(task, length, self._run.samples - 1)  # are there as many whose own documents fit?
        draft, budget = self._draft(task, length, 0), length - TASKS[task].max_new_tokens
        needed = len(self._ids(draft, draft.message(draft.smallest)))
        if needed > budget and available is None:
            raise too_short(task, length, needed + TASKS[task].max_new_tokens)

    def unfilled(self, task: str, length: int) -> str | None:
        """Why all that a task has cannot fill a length, or None where it can."""
        draft, budget = self._draft(task, length, 0), length - TASKS[task].max_new_tokens
        if draft.largest is None or len(self._ids(draft, draft.message(draft.largest))) >= _FULL * budget:
            return None
        return f"its {draft.largest} words do not fill that length"

    def prompt(self, question: Question) -> Made:
        task, length = question.task, question.length_tokens
        budget = length - TASKS[task].max_new_tokens
        draft = self._draft(task, length, self._number(task, length, int(question.sample.removeprefix("sample="))))
        fitted = fit(draft, lambda message: self._ids(draft, message), budget)
        if fitted is None:
            needed = len(self._ids(draft, draft.message(draft.smallest)))
            raise too_short(task, length, needed + TASKS[task].max_new_tokens)
        text = self._chat.text(fitted.message)
        at = first_character(text, fitted.message, draft.question)
        whole = text + draft.answer_prefix
        example = Example(
            benchmark=self._run.benchmark,
            task=task,
            length_tokens=length,
            sample=question.sample,
            input_ids=tuple(fitted.input_ids),
            references=draft.references,
            max_new_tokens=TASKS[task].max_new_tokens,
            meta={
                **draft.meta,
                "chat_template": self._templated,
                "answer_prefix": self._chat.begun(draft.answer_prefix),
            },
            asked_from=partial(first_token, self._tokenizer, self._chat.ids, whole, at),
        )
        return Made(example, text, draft.question.strip())

    def _draft(self, task: str, length: int, number: int) -> Draft:
        rng = seeded("ruler", self._run.seed, task, length, number)
        return TASKS[task].draft(self._shop, rng, length, number)

    def _ids(self, draft: Draft, message: str) -> list[int]:
        return self._chat.ids(self._chat.text(message, draft.answer_prefix))

    def _number(self, task: str, length: int, sample: int) -> int:
        """The question behind a sample: the same one, unless the documents that come with some do not fit."""
        available = TASKS[task].count(self._shop)
        if available is None:
            return sample
        usable = self._usable.setdefault((task, length), [])
        budget = length - TASKS[task].max_new_tokens
        for number in count(usable[-1] + 1 if usable else 0):
            if sample < len(usable):
                break
            if number == available:
                helps = "use fewer --samples" if usable else "use a longer one, or leave the task out with --tasks"
                raise SkvError(f"a length of {length} tokens holds {len(usable)} questions of {task}; {helps}")
            draft = self._draft(task, length, number)
            if len(self._ids(draft, draft.message(draft.smallest))) <= budget:
                usable.append(number)
        return usable[sample]


def profile_notes(profile: str) -> list[str]:
    """What a table must say about the metrics of a profile."""
    if profile == "nvidia":
        return []
    return ["scores by ShadowKV's metrics: not comparable with NVIDIA's string_match; an empty answer scores 0"]
