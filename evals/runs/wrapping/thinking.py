"""A task whose answers may begin with a thought: it is not scored, and may have tokens of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from evals.common.asking.thoughts import Markers, Thinking, ends_inside
from evals.runs.task import Example, Question
from evals.runs.wrapping.wrapped import WrappedTask

_PREFIX_TOKENS = 64  # an answer that is begun is not longer


@dataclass(frozen=True)
class ThinkingTask(WrappedTask):
    """`task` with thoughts. Prompts stay as they are: a thought's tokens come on top of a prompt's length.

    closing: what the chat template puts behind a message, by which a prompt that was put into it is known ·
    thought_tokens: what an answer may be longer, None for what it may have anyway.
    """

    markers: Markers
    closing: str
    thought_tokens: int | None = None

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        reach = len(tokenizer(self.closing, add_special_tokens=False)["input_ids"]) + _PREFIX_TOKENS
        for example in self.task.examples(tokenizer, wanted):
            yield self._thinking(tokenizer, example, reach)

    def config(self) -> dict[str, Any]:
        own = {} if self.thought_tokens is None else {"thinking_tokens": self.thought_tokens}
        return {**self.task.config(), **own}

    def _thinking(self, tokenizer: Any, turn: Example, reach: int) -> Example:
        later = tuple(self._thinking(tokenizer, other, reach) for other in turn.later)
        tail = str(tokenizer.decode(list(turn.input_ids[-reach:]), skip_special_tokens=False))
        if _dense(self.closing) not in _dense(tail):
            return replace(turn, later=later)
        return replace(
            turn,
            max_new_tokens=turn.max_new_tokens + (self.thought_tokens or 0),
            thinking=Thinking(self.markers, ends_inside(self.closing), turn.max_new_tokens),
            later=later,
        )


def _dense(text: str) -> str:
    """Without the white space that some tokenizers change."""
    return "".join(text.split())
