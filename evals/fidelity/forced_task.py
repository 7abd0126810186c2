"""Any benchmark's prompts with a continuation that is forced instead of answers that are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.common.chat import prompt_ids
from evals.runs.forced.forcing import Forcing
from evals.runs.task import Example, Question
from evals.runs.wrapping.wrapped import WrappedTask
from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean
from shadowkv.common.reading import read_text

CONTINUATIONS = ("text", "greedy")


@dataclass(frozen=True)
class ForcedTask(WrappedTask):
    """`task`, whose prompts go on with their own text, with full attention's answer (greedy) or with a file's text.

    Raises `SkvError` for prompts that no text follows, unless another continuation is asked for.
    """

    forcing: Forcing
    continuation: str

    @property
    def benchmark(self) -> str:
        return "fidelity"

    def __post_init__(self) -> None:
        if self.forcing.tokens < 1:
            raise SkvError(f"--forced must be at least 1 token, got {self.forcing.tokens}")
        if self.continuation == "text" and self.task.benchmark != self.benchmark:
            raise SkvError(
                f"no text follows a prompt of {self.task.benchmark}: --continuation greedy forces full attention's "
                "answer, and a file's name that file's text"
            )
        if self.task.config().get("turns", 1) > 1:
            raise SkvError("--forced goes on after one question: leave out --turns")

    @property
    def forced(self) -> Forcing:
        return self.forcing

    @property
    def of_file(self) -> bool:
        """Whether a file is named."""
        return self.continuation not in CONTINUATIONS

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        self._tokens_of_file(tokenizer)
        return self.task.questions(tokenizer)

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        given = self._tokens_of_file(tokenizer)
        for example in self.task.examples(tokenizer, wanted):
            if self.of_file:
                yield _with_continuation(example, given)
            else:
                yield example if self.continuation == "text" else _with_continuation(example, ())

    def _tokens_of_file(self, tokenizer: Any) -> tuple[int, ...]:
        if not self.of_file:
            return ()
        path = Path(self.continuation).expanduser()
        try:
            text = read_text(path, f"continuation {path}")
        except OSError as error:
            hint = did_you_mean(self.continuation, CONTINUATIONS)
            raise SkvError(
                f"--continuation {self.continuation}{hint}: it takes text, greedy or a file that can be read "
                f"({error.strerror})"
            ) from None
        ids = prompt_ids(tokenizer, text, special=False)
        if len(ids) <= self.forcing.tokens:
            raise SkvError(
                f"continuation {path} holds {len(ids)} tokens; {self.forcing.tokens} forced ones need one more"
            )
        return tuple(ids[: self.forcing.tokens + 1])

    def config(self) -> dict[str, Any]:
        more = {"one_by_one": True} if self.forcing.one_by_one else {}
        of = {"prompts": self.task.benchmark} if self.task.benchmark != self.benchmark else {}
        given = Path(self.continuation).name if self.of_file else self.continuation
        return {**self.task.config(), **of, "forced_tokens": self.forcing.tokens, "continuation": given, **more}

    def sources(self) -> dict[str, Any]:
        if not self.of_file:
            return self.task.sources()
        path = Path(self.continuation).expanduser()
        told = {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        return {**self.task.sources(), "continuation": told}

    def notes(self) -> list[str]:
        fed = {"text": "the text's own continuation", "greedy": "full attention's greedy answer"}
        said = fed.get(self.continuation, f"the text of {Path(self.continuation).name}")
        steps = "one by one" if self.forcing.one_by_one else "at once"
        return [*self.task.notes(), f"every method was fed {said}, at most {self.forcing.tokens} tokens, {steps}"]


def _with_continuation(example: Example, ids: tuple[int, ...]) -> Example:
    """The example whose first question is followed by this."""
    if example.references or not example.later:
        return replace(example, continuation=ids)
    first, *others = example.later
    return replace(example, later=(_with_continuation(first, ids), *others))
