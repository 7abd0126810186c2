"""Where a question stands: in the prompt that a method takes over, or after it, as a later turn of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean

IN_PROMPT, AFTER, BOTH = "in-prompt", "after", "both"
PLACES = (IN_PROMPT, AFTER, BOTH)
_MARK = " · question after"  # behind the label of a method, where it is not known to be alone


def check_place(place: str) -> str:
    """The place, if it is one. Raises `SkvError` if not."""
    if place not in PLACES:
        raise SkvError(f"unknown --question '{place}'{did_you_mean(place, PLACES)}; one of {', '.join(PLACES)}")
    return place


def shown(method: str, place: str) -> str:
    """What a method is called in tables and plots, where its questions stand at `place`."""
    return f"{method}{_MARK}" if place == AFTER else method


def method_of(label: str) -> str:
    """The method behind what `shown` made of it."""
    return label.removesuffix(_MARK)


def what_follows(template: str, field: str, **fields: str) -> str:
    """The rest of a template behind the last `{field}`, filled in: a question about what stands there."""
    return template.rpartition(f"{{{field}}}")[2].format(**fields)


def first_character(text: str, message: str, question: str) -> int:
    """Where a question begins in a whole prompt whose message ends with it; -1 where it is not in it as it was.

    White space before it belongs to what it is about. A chat template may have trimmed the message, or changed it: then
    the last place of the question's own words counts.
    """
    whole, asked = message.strip(), question.strip()
    at = text.rfind(whole)
    if at < 0:
        return text.rfind(asked)
    return at + len(whole) - len(asked) if whole.endswith(asked) else -1


def first_token(tokenizer: Any, ids_of: Callable[[str], Sequence[int]], text: str, at: int) -> int:
    """The number of tokens before the character `at`: a token that holds both sides is none of them.

    `ids_of` makes the ids of a whole prompt. What the text before `at` and the whole text begin with alike holds
    nothing of what comes later, whatever the tokenizer merges; from there, tokens are passed over while all of the rest
    is still behind them. 0 for a place that is none.
    """
    if at <= 0:
        return 0
    ids, before, rest = ids_of(text), ids_of(text[:at]), text[at:]
    alike = (place for place, (one, other) in enumerate(zip(ids, before, strict=False)) if one != other)
    first = next(alike, min(len(ids), len(before)))
    while first < len(ids) and tokenizer.decode(ids[first + 1 :], clean_up_tokenization_spaces=False).endswith(rest):
        first += 1
    return first
