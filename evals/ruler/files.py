"""RULER prompts as JSONL files in NVIDIA's schema: written for others to run, read from wherever they were made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from evals.common.asking.question import first_token
from evals.common.chat import Chat, prompt_ids
from evals.common.jsonl import check_text, read_jsonl
from evals.ruler.task import Ruler, RulerTask, profile_notes
from evals.ruler.tasks import TASKS, find_profile
from evals.runs.task import Example, Question
from shadowkv.common.errors import SkvError
from shadowkv.common.home import sha256_of

_FILE = "validation.jsonl"


def write_files(
    run: Ruler, tokenizer: Any, folder: Path, on_prompt: Callable[[int, int], None] = lambda done, total: None
) -> list[Path]:
    """Write `<folder>/<length>/<task>/validation.jsonl`; `input` holds the chat template, as NVIDIA's does."""
    questions = run.questions(tokenizer)
    cells: dict[Path, list[str]] = {}
    for done, (example, text, asked) in enumerate(run.made(tokenizer, questions), 1):
        tokens = len(example.input_ids) + example.max_new_tokens
        prefix = str(example.meta["answer_prefix"])
        row = {
            "index": int(example.sample.removeprefix("sample=")),
            "input": text,
            "outputs": list(example.references),
            "length": tokens,
            "length_w_model_temp": tokens,
            "answer_prefix": prefix,
            "question": asked,
            "templated": bool(example.meta["chat_template"]),
        }
        path = folder / str(example.length_tokens) / example.task / _FILE
        cells.setdefault(path, []).append(json.dumps(row, ensure_ascii=False))
        on_prompt(done, len(questions))
    for path, lines in cells.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return list(cells)


@dataclass(frozen=True)
class RulerFiles(RulerTask):
    """Prompts read from `<folder>/<length>/<task>/validation.jsonl`, as they are.

    `wrap` puts the model's chat template around inputs that were written without one.
    """

    folder: Path
    lengths: tuple[int, ...]  # none for all that are there
    tasks: tuple[str, ...]
    samples: int | None = None
    profile: str = "nvidia"
    wrap: bool = False
    all_tasks: bool = True  # tasks that are not there are left out without a word
    context_tokens: int | None = None  # prompts of greater lengths are refused
    thinking: str = "auto"  # of the template that is put around

    def __post_init__(self) -> None:
        find_profile(self.profile)
        if self.samples is not None and self.samples < 1:
            raise SkvError(f"--samples must be at least 1, got {self.samples}")

    @cached_property
    def _cells(self) -> dict[tuple[int, str], Path]:
        """The file of every length and task there is."""
        if not self.folder.is_dir():
            raise SkvError(f"{self.folder} is not a folder")
        return {
            (int(path.parts[-3]), path.parts[-2]): path
            for path in sorted(self.folder.glob(f"*/*/{_FILE}"))
            if path.parts[-3].isdecimal() and path.parts[-2] in TASKS
        }

    def left_out(self, tokenizer: Any) -> dict[str, str]:
        lengths = self.lengths or sorted({length for length, _ in self._cells})
        missing = [(n, task) for n in lengths for task in self.tasks if (n, task) not in self._cells]
        return {} if self.all_tasks else {f"{task} at {n}": "no file" for n, task in missing}

    @cached_property
    def _rows(self) -> dict[Question, _Row]:
        found = self._cells
        lengths = self.lengths or tuple(sorted({length for length, _ in found}))
        chosen = {
            (length, task): found[length, task] for length in lengths for task in self.tasks if (length, task) in found
        }
        if not chosen:
            raise SkvError(f"{self.folder} holds no <length>/<task>/{_FILE} of the lengths and tasks asked for")
        beyond = [length for length, _ in chosen if self.context_tokens is not None and length > self.context_tokens]
        if beyond:
            raise SkvError(
                f"prompts of {max(beyond)} tokens are beyond this model's context of {self.context_tokens} tokens; "
                "choose with --lengths"
            )
        return {
            Question(task, length, f"line={number}"): row
            for (length, task), path in chosen.items()
            for number, row in enumerate(_read(path)[: self.samples], 1)
        }

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        return list(self._rows)

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        chat = Chat(tokenizer, self.thinking) if self.wrap else None
        for question in self._rows if wanted is None else wanted:
            row = self._rows[question]
            text = chat.text(row.input, row.answer_prefix) if chat else row.input + row.answer_prefix
            ids_of = chat.ids if chat else partial(_as_written, tokenizer, row)
            at = -1 if row.question is None else text.rfind(row.question.strip())
            yield Example(
                benchmark=self.benchmark,
                task=question.task,
                length_tokens=question.length_tokens,
                sample=question.sample,
                input_ids=tuple(ids_of(text)),
                references=row.outputs,
                max_new_tokens=TASKS[question.task].max_new_tokens,
                asked_from=partial(first_token, tokenizer, ids_of, text, at),
            )

    def notes_after(self) -> list[str]:
        silent = next((question for question, row in self._rows.items() if row.question is None), None)
        if silent is not None:
            raise SkvError(
                f"--question after: {self.folder.name}/{silent.length_tokens}/{silent.task}/{_FILE}, {silent.sample}, "
                "does not say where its question begins; give its words as 'question'"
            )
        return []

    def chat_answer_tokens(self) -> Collection[int]:
        return [TASKS[task].max_new_tokens for task in self.tasks] if self.wrap else ()

    def config(self) -> dict[str, Any]:
        return {"profile": self.profile, "wrap": self.wrap}

    def selection(self) -> dict[str, Any]:
        return {"lengths": self.lengths, "tasks": self.tasks, "samples": self.samples}

    def sources(self) -> dict[str, Any]:
        # Of all files, whatever was chosen of them, so that a run can grow.
        sums = [f"{length} {task} {sha256_of(path)}" for (length, task), path in self._cells.items()]
        checksum = hashlib.sha256("\n".join(sums).encode()).hexdigest()
        return {"ruler": {"name": "files", "folder": self.folder.name, "sha256": checksum}}

    def notes(self) -> list[str]:
        return ["prompts from files: comparable only with runs on the same files", *profile_notes(self.profile)]


class _Row(NamedTuple):
    input: str
    answer_prefix: str
    outputs: tuple[str, ...]
    question: str | None  # what the input asks behind its text; unknown for files from elsewhere
    templated: bool | None  # whether the input spells out its special tokens; unknown for files from elsewhere


def _read(path: Path) -> list[_Row]:
    rows = []
    for number, raw in read_jsonl(path):
        text, outputs, prefix = raw.get("input"), raw.get("outputs"), raw.get("answer_prefix", "")
        if not isinstance(text, str) or not isinstance(prefix, str) or not text:
            raise SkvError(f"{path}, line {number}: 'input' is missing or not a text")
        if not isinstance(outputs, list) or not outputs or not all(isinstance(x, str) and x for x in outputs):
            raise SkvError(f"{path}, line {number}: 'outputs' is not a list of answers")
        check_text(f"{path}, line {number}", text, prefix, *outputs)
        asked = raw.get("question")
        if asked is not None and (not isinstance(asked, str) or not asked.strip() or asked.strip() not in text):
            raise SkvError(f"{path}, line {number}: 'question' is not a part of 'input'")
        rows.append(_Row(text, prefix, tuple(outputs), asked, raw.get("templated")))
    return rows


def _as_written(tokenizer: Any, row: _Row, text: str) -> list[int]:
    """Ids of a prompt from a file: special tokens are added only if it does not spell them out itself."""
    plain = prompt_ids(tokenizer, text, special=False)
    if row.templated is not None:
        return plain if row.templated else prompt_ids(tokenizer, text, special=True)
    beginning = prompt_ids(tokenizer, "", special=True)
    spelled = plain[: len(beginning)] == beginning
    return plain if spelled else prompt_ids(tokenizer, text, special=True)
