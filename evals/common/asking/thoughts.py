"""What a model thinks before it answers: how its end is found, and the answer behind it.

Markers are looked for in what the chat template makes, in the template itself and among the tokens that a tokenizer
adds, never by a model's name.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_TAG = re.compile(r"[<\[◁]([^<>\[\]◁▷\s]*(?:think|thought|reasoning)[^<>\[\]◁▷\s]*)[>\]▷]", re.IGNORECASE)
_CLOSING = re.compile(r"^\W*/|(?:^|[^a-z])end(?:[^a-z]|$)", re.IGNORECASE)
_PLACE_WORDS = frozenset({"begin", "start", "end", "of"})  # of a marker's words, those that say which of the two it is


class Markers(NamedTuple):
    """How a thought begins and ends. `begin` is empty where only the end is known."""

    begin: str
    end: str


def knows_thoughts(text: str) -> bool:
    """Whether a template speaks of thoughts."""
    return _TAG.search(text) is not None


def ends_inside(text: str) -> bool:
    """Whether the last marker in a text begins a thought."""
    tags = _TAG.findall(text)
    return bool(tags) and not _is_closing(tags[-1])


def find_markers(texts: Sequence[str]) -> Markers | None:
    """The first end of a thought in these texts that has a beginning in any of them; else the first end; else None."""
    begins, ends = dict[str, str](), list[tuple[str, str]]()
    for text in texts:
        for spelled, inner in _tags(text):
            kind = "".join(word for word in re.findall(r"[a-z]+", inner.lower()) if word not in _PLACE_WORDS)
            if _is_closing(inner):
                ends.append((kind, spelled))
            else:
                begins.setdefault(kind, spelled)
    paired = [Markers(begins[kind], end) for kind, end in ends if kind in begins]
    alone = [Markers("", end) for _, end in ends]
    return next(iter([*paired, *alone]), None)


def _tags(text: str) -> Iterator[tuple[str, str]]:
    return ((found[0], found[1]) for found in _TAG.finditer(text))


def _is_closing(inner: str) -> bool:
    return _CLOSING.search(inner) is not None


@dataclass(frozen=True)
class Thinking:
    """How an answer is read that may begin with a thought.

    inside: whether the prompt has begun one · answer_tokens: the longest answer behind it.
    """

    markers: Markers
    inside: bool
    answer_tokens: int


@dataclass(frozen=True)
class Said:
    """An answer as it is scored, and what is known of the thought before it, for its record."""

    prediction: str
    meta: dict[str, Any] = field(default_factory=dict)


def read_answer(tokenizer: Any, tokens: Sequence[int], thinking: Thinking | None) -> Said:
    """The text of an answer without its thought; an empty one where the thought did not come to an end.

    A thought is one where the prompt began it, or where the answer begins with its marker.
    """
    if thinking is None:
        return Said(_text(tokenizer, tokens))
    whole, (begin, end) = _spelled(tokenizer, tokens), thinking.markers
    if not thinking.inside and not (begin and whole.lstrip().startswith(begin)):
        return _said(_text(tokenizer, tokens[: thinking.answer_tokens]), tokens, thinking, {})
    if end not in whole:
        return Said("", {"thought_tokens": len(tokens), "thought_cut": True})
    count = bisect_left(range(len(tokens)), True, key=lambda n: end in _spelled(tokenizer, tokens[:n]))
    # Where the marker is several tokens, the last of them may hold the beginning of the answer.
    behind = _spelled(tokenizer, tokens[:count]).partition(end)[2]
    answer = tokens[count:]
    prediction = (behind + _text(tokenizer, answer[: thinking.answer_tokens])).lstrip()
    return _said(prediction, answer, thinking, {"thought_tokens": count, "thought_cut": False})


def _said(prediction: str, answer: Sequence[int], thinking: Thinking, meta: dict[str, Any]) -> Said:
    """A short thought leaves room for more of an answer than there may be, which is cut off."""
    cut = {"answer_cut": True} if len(answer) > thinking.answer_tokens else {}
    return Said(prediction, {**meta, **cut})


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def _spelled(tokenizer: Any, tokens: Sequence[int]) -> str:
    """With special tokens, which markers may be."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False))
