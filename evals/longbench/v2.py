"""LongBench v2: 503 questions with four choices over texts of 8K to 2M words, judged by the letter that is named."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from evals.common.asking.question import first_character, first_token
from evals.common.chat import Chat
from evals.longbench.data import hub_file
from evals.longbench.truncation import without_middle
from evals.runs.task import Example, Question, Task
from shadowkv.common.errors import SkvError
from shadowkv.common.home import sha256_of
from shadowkv.common.reading import read_text

_OFFICIAL_SHA256 = "68a162252bc9ff71d5d7abca3d69bb31aac3c35f832d657a2866f2018b8a6950"  # prompts/0shot.txt
_OWN = (
    "Here is a text, followed by a question about it with four possible answers.\n\n$DOC$\n\nQuestion: $Q$\n"
    "(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\n"
    'Reply with one sentence of this form and nothing else: "The correct answer is (X)", X being a letter.'
)
_TEXT = "$DOC$"
_FIELDS = {_TEXT: "context", "$Q$": "question", **{f"$C_{letter}$": f"choice_{letter}" for letter in "ABCD"}}
_LABELS = ("difficulty", "length", "domain", "sub_domain")
_QUESTIONS = 503
LONGEST_PROMPT_TOKENS = 120_000


def named_choice(prediction: str) -> str | None:
    """The letter that an answer settles on, by the authors' two patterns."""
    text = prediction.strip().replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return found.group(1) if found else None


@dataclass(frozen=True)
class LongBenchV2(Task):
    """Settings of a run; greedy unless a temperature is given, where the authors sample at 0.1."""

    benchmark = "longbench-v2"

    max_prompt_tokens: int
    samples: int | None = None
    data: str | None = None
    wording: str = "own"
    max_new_tokens: int = 128
    thinking: str = "auto"
    offline: bool = False  # rows are not fetched from the Hub

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise SkvError(f"--samples must be at least 1, got {self.samples}")

    @cached_property
    def _path(self) -> Path:
        hub = partial(hub_file, "THUDM/LongBench-v2", "data.json", offline=self.offline)
        path = Path(self.data).expanduser() if self.data else hub()
        return path / "data.json" if path.is_dir() else path

    @cached_property
    def _rows(self) -> list[dict[str, str]]:
        try:
            raw = json.loads(read_text(self._path))
        except OSError as error:
            raise SkvError(f"{self._path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise SkvError(f"{self._path} is not JSON; LongBench v2's data.json is expected") from None
        if not isinstance(raw, list) or not raw:
            raise SkvError(f"{self._path} is not a list of questions")
        for number, row in enumerate(raw):
            if not isinstance(row, dict):
                raise SkvError(f"{self._path}, question {number}: not an object")
            missing = [key for key in (*_FIELDS.values(), "answer", *_LABELS[:2]) if not isinstance(row.get(key), str)]
            if missing:
                raise SkvError(f"{self._path}, question {number}: '{missing[0]}' is missing or not a text")
            if row["answer"] not in tuple("ABCD"):
                raise SkvError(f"{self._path}, question {number}: 'answer' is not one of A, B, C, D")
        return raw

    @cached_property
    def _template(self) -> str:
        if self.wording in ("own", "official"):
            # No package has the official text, so there is nothing to take it from but a file of the user's.
            if self.wording == "official":
                raise SkvError(
                    "the official template of LongBench v2 comes in no package; give its 0shot.txt: --wording FILE"
                )
            return _OWN
        try:
            text = read_text(Path(self.wording).expanduser(), f"template {self.wording}")
        except OSError as error:
            raise SkvError(f"template {self.wording} cannot be read: {error.strerror}") from None
        lacking = [field for field in _FIELDS if field not in text]
        if lacking:
            raise SkvError(f"template {self.wording} has no {lacking[0]}")
        return text

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        _ = self._template
        rows = self._rows[: self.samples]
        return [Question("multiple_choice", self.max_prompt_tokens, f"row={i}") for i in range(len(rows))]

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        chat = Chat(tokenizer, self.thinking)
        for question in self.questions(tokenizer) if wanted is None else wanted:
            row = self._rows[int(question.sample.removeprefix("row="))]
            filled = self._filled(row, self._template)
            text = without_middle(tokenizer, filled, self.max_prompt_tokens)
            whole = chat.text(text)
            at = first_character(whole, text, self._filled(row, self._template.rpartition(_TEXT)[2]))
            yield Example(
                benchmark=self.benchmark,
                task=question.task,
                length_tokens=question.length_tokens,
                sample=question.sample,
                input_ids=tuple(chat.ids(whole)),
                references=(row["answer"],),
                max_new_tokens=self.max_new_tokens,
                meta={"id": row.get("_id", ""), **{label: row.get(label, "") for label in _LABELS}},
                asked_from=partial(first_token, tokenizer, chat.ids, whole, at),
            )

    def _filled(self, row: dict[str, str], template: str) -> str:
        """In one pass, so that a placeholder inside a text stays as it is."""
        return "".join(_value(row, part) for part in re.split(r"(\$[A-Z_]+\$)", template))

    def notes_after(self) -> list[str]:
        if "$Q$" not in self._template.rpartition(_TEXT)[2]:
            raise SkvError(f"--question after: template {self.wording} asks before its text")
        return []

    def score(self, example: Example, prediction: str) -> float:
        return float(named_choice(prediction) in example.references)

    def chat_answer_tokens(self) -> Collection[int]:
        return (self.max_new_tokens,)

    def config(self) -> dict[str, Any]:
        return {"max_prompt_tokens": self.max_prompt_tokens, "max_new_tokens": self.max_new_tokens}

    def selection(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def sources(self) -> dict[str, Any]:
        template = {"name": self.wording, "sha256": hashlib.sha256(self._template.encode()).hexdigest()}
        return {"template": template, "rows": {"name": self._path.name, "sha256": sha256_of(self._path)}}

    def notes(self) -> list[str]:
        told = ["an answer that names no choice counts as wrong, as in the original"]
        if self.samples is not None and self.samples < _QUESTIONS:
            told.append(f"{self.samples} of {_QUESTIONS} questions, the first ones; --samples {_QUESTIONS} takes all")
        if hashlib.sha256(self._template.encode()).hexdigest() != _OFFICIAL_SHA256:
            told.append("not the official prompt template: not comparable with published scores")
        return told


def _value(row: dict[str, str], part: str) -> str:
    """What stands for a part of the template: a field of the row, or the part itself."""
    return row[_FIELDS[part]].strip() if part in _FIELDS else part
