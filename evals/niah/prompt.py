"""Prompts put together from tokens: exactly as long as allowed, and equal up to where their needles lie.

The pieces are tokenised one by one and joined as ids, so prompts of all depths (and of shorter lengths) of one
haystack share its tokens from the first one on, and the engine computes what they share once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals.common.chat import Chat, prompt_ids
from evals.common.seeding import seeded
from evals.niah.protocols import Needle
from shadowkv.common.errors import SkvError

_LEAST_ROOM = 16  # tokens of haystack per needle
_SENTENCE_ENDS = (".", "!", "?", ".\n", ".\n\n", '."', ".)")


class Haystacks:
    """Token ids of one haystack, from a start that depends on the round, repeated as far as needed."""

    def __init__(self, tokenizer: Any, text: str, seed: int) -> None:
        self.text = text
        self._tokenizer = tokenizer
        self._seed = seed
        self._ids: dict[int, list[int]] = {}
        self._ends: dict[int, bool] = {}

    def ids(self, round_: int, count: int) -> list[int]:
        """The first `count` tokens of this round's haystack."""
        held = self._ids.get(round_, [])
        characters = max(count * 6, 2000)
        while len(held) < count:
            held = prompt_ids(self._tokenizer, self._from_start(round_, characters), special=False)
            # The last tokens change when the text goes on, so they are not to be relied on.
            held = held[: max(len(held) - 16, 0)]
            characters *= 2
        self._ids[round_] = held
        return held[:count]

    def cut(self, ids: list[int], depth: float) -> int:
        """Where a needle at `depth` percent goes: the last sentence end before it, or else the next one."""
        wanted = round(len(ids) * depth / 100)
        if wanted in (0, len(ids)):
            return wanted
        before = next((i for i in range(wanted, 0, -1) if self._ends_sentence(ids[i - 1])), None)
        after = next((i for i in range(wanted, len(ids)) if self._ends_sentence(ids[i - 1])), None)
        return before if before is not None else after if after is not None else wanted

    def _from_start(self, round_: int, characters: int) -> str:
        start = 0
        if round_ > 0 or self._seed != 0:
            anywhere = seeded("haystack", self._seed, round_).randrange(len(self.text))
            start = self.text.find(". ", anywhere) + 2 if ". " in self.text[anywhere:] else 0
        copies = -(-(start + characters) // len(self.text))
        return "\n\n".join([self.text] * (copies + 1))[start : start + characters]

    def _ends_sentence(self, token: int) -> bool:
        if token not in self._ends:
            self._ends[token] = self._tokenizer.decode([token]).strip(" ").endswith(_SENTENCE_ENDS)
        return self._ends[token]


def frame(
    chat: Chat, tokenizer: Any, haystacks: Haystacks, instruction: str, needles: Sequence[Needle]
) -> tuple[list[int], list[int]]:
    """Tokens before and after the text: chat template, instruction, the first question and start of the answer."""
    asked = needles[0]
    # All that a text is made of, copies joined as there, so that a template which would change any of it is found.
    text = "\n\n".join([haystacks.text, " ".join([haystacks.text, *(needle.fact for needle in needles)])])
    prefix = asked.answer_prefix if chat.templated else f"\n{asked.answer_prefix}"
    before, after = chat.around(f"{instruction}\n\n", text, f"\n\n{asked.question}", prefix)
    return chat.ids(before), prompt_ids(tokenizer, after, special=False)


def follow_up(chat: Chat, tokenizer: Any, needle: Needle) -> list[int]:
    """Tokens between an answer and the next one: the end of the turn, the question and the start of its answer."""
    return prompt_ids(tokenizer, chat.next_turn(needle.question, needle.answer_prefix), special=False)


def assemble_many(
    chat: Chat,
    tokenizer: Any,
    haystacks: Haystacks,
    instruction: str,
    needles: Sequence[Needle],
    depths: Sequence[float],
    budget: int,
    round_: int,
) -> tuple[list[int], list[int]]:
    """A text with several needles, and the question of the first one: ids of both parts, `budget` tokens in all."""
    before, asked = frame(chat, tokenizer, haystacks, instruction, needles)
    facts = [prompt_ids(tokenizer, f" {needle.fact}", special=False) for needle in needles]
    room = budget - len(before) - len(asked) - sum(map(len, facts))
    if room < _LEAST_ROOM * len(needles):
        raise SkvError(
            f"a length of {budget} tokens leaves no room for a haystack: template, {len(needles)} needles and "
            f"question take {budget - room}; use a longer one"
        )
    hay = haystacks.ids(round_, room)
    places = sorted((haystacks.cut(hay, depth), number) for number, depth in enumerate(depths))
    context, done = list(before), 0
    for place, number in places:
        context += [*hay[done:place], *facts[number]]
        done = place
    return [*context, *hay[done:]], asked


def assemble(
    chat: Chat,
    tokenizer: Any,
    haystacks: Haystacks,
    instruction: str,
    needle: Needle,
    budget: int,
    depth: float,
    round_: int,
) -> tuple[tuple[int, ...], int, int]:
    """A prompt of exactly `budget` tokens and the indices at which its needle and its question begin."""
    before, after = frame(chat, tokenizer, haystacks, instruction, [needle])
    fact = prompt_ids(tokenizer, f" {needle.fact}", special=False)
    room = budget - len(before) - len(fact) - len(after)
    if room < _LEAST_ROOM:
        raise SkvError(
            f"a length of {budget} tokens leaves no room for a haystack: template, needle and question take "
            f"{budget - room}; use a longer one"
        )
    hay = haystacks.ids(round_, room)
    at = haystacks.cut(hay, depth)
    ids = (*before, *hay[:at], *fact, *hay[at:], *after)
    return ids, len(before) + at, len(ids) - len(after)
