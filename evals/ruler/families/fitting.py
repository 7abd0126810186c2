"""How large a haystack may be: the most that a budget of tokens holds, found in a few measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shadowkv.common.errors import SkvError

_STEPS_PER_BUDGET = 400  # sizes are tried in steps of a quarter of a percent of the budget
_INTERPOLATED = 8  # probes before plain bisection takes over


@dataclass(frozen=True)
class Draft:
    """One sample whose haystack has no size yet."""

    message: Callable[[int], str]  # haystack size, in units -> what the user says
    answer_prefix: str
    references: tuple[str, ...]
    smallest: int  # units
    unit_tokens: float  # roughly; only decides which sizes are tried
    largest: int | None = None  # units there are, None for any number
    meta: Mapping[str, Any] = field(default_factory=dict)
    question: str = ""  # what the message ends with, behind the text it is about


class Fitted(NamedTuple):
    """A message of the right size, and the ids of the whole prompt around it."""

    message: str
    input_ids: list[int]


def fit(draft: Draft, ids_of: Callable[[str], list[int]], budget_tokens: int) -> Fitted | None:
    """The longest prompt within the budget, None if even the smallest one is longer.

    `ids_of` turns a message into the ids of the whole prompt. The answer depends on nothing else, so a sample is
    the same whichever others are made.
    """
    step = max(1, int(budget_tokens / _STEPS_PER_BUDGET / draft.unit_tokens))

    def sized(steps: int) -> Fitted:
        message = draft.message(draft.smallest + steps * step)
        return Fitted(message, ids_of(message))

    best, low = sized(0), 0
    if len(best.input_ids) > budget_tokens:
        return None
    # The first size that is too large, as far as is known: a unit has a quarter of a token at least.
    high = 4 * budget_tokens + 2 if draft.largest is None else (draft.largest - draft.smallest) // step + 1
    rate = step * draft.unit_tokens
    probes = 0
    while high - low > 1:
        tokens = len(best.input_ids)
        ahead = int((budget_tokens - tokens) / rate) if probes < _INTERPOLATED else (high - low) // 2
        at = min(max(low + ahead, low + 1), high - 1)
        probe = sized(at)
        grown = len(probe.input_ids) - tokens
        if grown > 0:
            rate = grown / (at - low)
        if len(probe.input_ids) <= budget_tokens:
            best, low = probe, at
        else:
            high = at
        probes += 1
    return best


def too_short(task: str, length_tokens: int, needed_tokens: int) -> SkvError:
    """What to say where a length holds no sample of a task."""
    return SkvError(
        f"a length of {length_tokens} tokens is too short for {task}, which needs at least {needed_tokens}; use a "
        f"longer one, or leave the task out with --tasks"
    )
