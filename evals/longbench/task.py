"""LongBench and LongBench-E as a benchmark: tasks x rows, by the rules of its authors' pred.py and eval.py."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, groupby, islice
from typing import Any

from evals.common.asking.question import first_character, first_token
from evals.common.chat import Chat, prompt_ids
from evals.common.grouping import grouped
from evals.longbench.data import Row, Rows
from evals.longbench.metrics import first_line, needs
from evals.longbench.prompts import Templates, templates
from evals.longbench.questions import question_notes, question_of
from evals.longbench.tasks import TASKS, Spec, bucket
from evals.longbench.truncation import without_middle
from evals.runs.task import Example, Question, Task
from shadowkv.common.errors import SkvError

_E = "_e"
_MOST_ROWS = 500  # of any task


@dataclass(frozen=True)
class LongBench(Task):
    """Settings of a LongBench run.

    all_tasks: tasks without rows, or that cannot be judged here, are left out instead of an error ·
    max_prompt_tokens: before the chat template; longer prompts lose their middle · min_tokens: rows whose whole prompt
    is not longer than this are left out (the ShadowKV paper: 4096).
    """

    benchmark = "longbench"

    tasks: tuple[str, ...]
    max_prompt_tokens: int
    all_tasks: bool = False
    e: bool = False
    samples: int | None = None
    data: str | None = None
    wording: str = "official"
    min_tokens: int = 0
    thinking: str = "auto"
    offline: bool = False  # no rows are fetched from the Hub

    def __post_init__(self) -> None:
        for name, value, least in (
            ("samples", self.samples, 1),
            ("max-prompt-tokens", self.max_prompt_tokens, 2),
            ("min-tokens", self.min_tokens, 0),
        ):
            if value is not None and value < least:
                raise SkvError(f"--{name} must be at least {least}, got {value}")
        other = [task for task in self.tasks if self.e and not TASKS[task].in_e]
        if other:
            raise SkvError(f"LongBench-E has no {other[0]}; leave out --e or the task")

    @cached_property
    def _templates(self) -> Templates:
        return templates(self.wording, self._runnable)

    @cached_property
    def _rows(self) -> Rows:
        return Rows(self.data, offline=self.offline)

    @cached_property
    def _why_not(self) -> dict[str, str]:
        reasons = {task: needs(TASKS[task].metric) for task in self.tasks}
        if self.all_tasks:
            reasons |= {task: "no rows" for task in self.tasks if not self._rows.has(self._label(task))}
        return {task: reason for task, reason in reasons.items() if reason}

    @cached_property
    def _texts(self) -> dict[str, list[int]]:
        """By task, what tells the contexts of its rows apart; filled as they are asked for."""
        return {}

    @property
    def _runnable(self) -> list[str]:
        tasks = [task for task in self.tasks if task not in self._why_not]
        if not tasks:
            task, reason = next(iter(self._why_not.items()))
            raise SkvError(f"none of the tasks can be run; {task}: {reason}")
        return tasks

    def left_out(self, tokenizer: Any) -> dict[str, str]:
        return {self._label(task): reason for task, reason in self._why_not.items()}

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        _ = self._templates  # an unusable template is an error before anything is tokenised
        found: list[Question] = []
        for task in self._runnable:
            kept = (
                Question(self._label(task), self.max_prompt_tokens, f"row={i}")
                for i, row in enumerate(self._rows.read(self._label(task)))
                if not self.min_tokens or self._prompt_tokens(tokenizer, task, row) > self.min_tokens
            )
            found += islice(kept, self.samples)
        if not found:
            raise SkvError(f"no row has a prompt of more than --min-tokens {self.min_tokens} tokens")
        return found

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        chat = Chat(tokenizer, self.thinking)
        asked = self.questions(tokenizer) if wanted is None else wanted
        for label, questions in groupby(asked, key=lambda question: question.task):
            rows = self._rows.read(label)
            # Those about one text one after the other, so that it is computed once.
            for question in chain.from_iterable(grouped(questions, self.prompt_of).values()):
                yield self._example(tokenizer, chat, question, rows[int(question.sample.removeprefix("row="))])

    def prompt_of(self, question: Question) -> Hashable:
        label, row = question.task, int(question.sample.removeprefix("row="))
        if label not in self._texts:
            self._texts[label] = [hash(row.context) for row in self._rows.read(label)]
        return label, self._texts[label][row]

    def _example(self, tokenizer: Any, chat: Chat, question: Question, row: Row) -> Example:
        spec = self._spec(question.task)
        text = without_middle(tokenizer, self._filled(spec.name, row), self.max_prompt_tokens)
        whole = chat.text(text) if spec.chat else text
        ids_of = chat.ids if spec.chat else partial(prompt_ids, tokenizer, special=True)
        at = first_character(whole, text, question_of(self._templates.by_task[spec.name], spec, row.input))
        # Models go on with another dialogue; the authors stop them at the first line break, after at least one token.
        newline = prompt_ids(tokenizer, "\n", special=False)[-1:] if spec.name == "samsum" else []
        return Example(
            benchmark=self.benchmark,
            task=question.task,
            length_tokens=question.length_tokens,
            sample=question.sample,
            input_ids=tuple(ids_of(whole)),
            references=row.answers,
            max_new_tokens=spec.max_new_tokens,
            meta={"id": row.id, "words": row.words, "bucket": bucket(row.words), "classes": row.classes},
            stop_ids=tuple(newline),
            min_new_tokens=int(bool(newline)),
            asked_from=partial(first_token, tokenizer, ids_of, whole, at),
        )

    def score(self, example: Example, prediction: str) -> float:
        spec = self._spec(example.task)
        said = first_line(prediction) if spec.first_line else prediction
        return max(spec.metric(said, answer, example.meta["classes"]) for answer in example.references)

    def chat_answer_tokens(self) -> Collection[int]:
        return [TASKS[task].max_new_tokens for task in self.tasks if TASKS[task].chat]

    def config(self) -> dict[str, Any]:
        return {"e": self.e, "max_prompt_tokens": self.max_prompt_tokens, "min_tokens": self.min_tokens}

    def selection(self) -> dict[str, Any]:
        return {"tasks": [self._label(task) for task in self._runnable], "samples": self.samples}

    def sources(self) -> dict[str, Any]:
        return {"templates": self._templates.described, "rows": self._rows.described()}

    def needs(self) -> tuple[str, ...]:
        return ("longbench",) if self.wording == "official" else ()

    def notes(self) -> list[str]:
        told = [] if self._templates.official else ["not the official prompt templates: not comparable with published"]
        if self.samples is not None and self.samples < _MOST_ROWS:
            told.append(f"at most {self.samples} rows per task, the first ones; --samples {_MOST_ROWS} takes all")
        if self.min_tokens:
            told.append(f"only rows whose prompt has more than {self.min_tokens} tokens")
        return told

    def notes_after(self) -> list[str]:
        return question_notes({TASKS[task]: self._templates.by_task[task] for task in self._runnable})

    def _label(self, task: str) -> str:
        return task + _E if self.e else task

    def _spec(self, label: str) -> Spec:
        return TASKS[label.removesuffix(_E) if self.e else label]

    def _filled(self, task: str, row: Row) -> str:
        return self._templates.by_task[task].format(context=row.context, input=row.input)

    def _prompt_tokens(self, tokenizer: Any, task: str, row: Row) -> int:
        return len(prompt_ids(tokenizer, self._filled(task, row), special=True))
