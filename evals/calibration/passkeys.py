"""Texts in which codes are hidden that are asked for at the end: what tells heads that retrieve from others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle, islice
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evals.common.seeding import seeded
from shadowkv.common.errors import SkvError

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_WORDS = (
    "amber,anchor,barley,basil,candle,canyon,cedar,copper,coral,cotton,ember,falcon,garden,ginger,harbor,hazel,"
    "island,ivory,jasmine,ladder,lemon,marble,meadow,mirror,nettle,olive,orchid,pepper,pillow,planet,quartz,ribbon,"
    "river,saddle,silver,spider,thunder,timber,velvet,window"
).split(",")
_CODE_WORDS, _CODE_DIGITS = 8, 8


class Passkeys(NamedTuple):
    """A text with codes in it, the questions with their answers that follow it, and which of their tokens are codes."""

    text: Tensor  # [1,n]
    answers: Tensor  # [1,T]
    counted: Tensor  # [T] bool


def passkeys(tokenizer: Any, filler: Sequence[int], tokens: int, sinks: int, recent: int, seed: int) -> Passkeys:
    """A text of `tokens` tokens, answers included, in which codes are hidden between its `sinks` and `recent` tokens.

    What is around them is cut from `filler`, from its start again where it ends. Codes are words or digits by turns.
    Everything random depends on the seed and the number of tokens. Raises `SkvError` where there is no room.
    """
    rng = seeded("passkeys", seed, tokens)

    def ids(said: str) -> list[int]:
        return list(tokenizer(said, add_special_tokens=False)["input_ids"])

    codes = {ordinal: _code(rng, digits=bool(i % 2)) for i, ordinal in enumerate(_ORDINALS)}
    hidden = [ids(f"\n\nThe {ordinal} code of the vault is {code}.\n\n") for ordinal, code in codes.items()]
    parts: list[tuple[list[int], bool]] = []
    for ordinal, code in codes.items():
        parts.append((ids(f"\n\nWhat is the {ordinal} code of the vault? The {ordinal} code of the vault is"), False))
        parts += [(ids(f" {code}"), True), (ids("."), False)]
    answers = list(chain.from_iterable(part for part, _ in parts))
    counted = list(chain.from_iterable([is_code] * len(part) for part, is_code in parts))
    around = tokens - len(answers) - sum(map(len, hidden))
    if around - recent - sinks < len(hidden):
        raise SkvError(
            f"--tokens {tokens} leaves no room for {len(hidden)} codes between {sinks} sinks and {recent} recent tokens"
        )
    first = [*filler[:1]] if filler[0] in tokenizer.all_special_ids else []  # that begins every text
    plain = filler[len(first) :]
    own = first + list(islice(cycle(plain), start := rng.randrange(len(plain)), start + around - len(first)))
    places = sorted(rng.sample(range(sinks, around - recent), len(hidden)))
    pieces = zip([0, *places], [*places, around], [*hidden, []], strict=True)
    text = list(chain.from_iterable([*own[begin:end], *needle] for begin, end, needle in pieces))
    return Passkeys(torch.tensor([text]), torch.tensor([answers]), torch.tensor(counted))


def _code(rng: Random, *, digits: bool) -> str:
    if digits:
        return "".join(rng.choices("0123456789", k=_CODE_DIGITS))
    return " ".join(rng.choices(_WORDS, k=_CODE_WORDS))
