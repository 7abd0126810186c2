"""Which words occur most often? In a numbered list of words, and in a coded text."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from evals.common.asking.question import what_follows
from evals.ruler.families.family import Family, Workshop, replayed
from evals.ruler.families.fitting import Draft

_LONG_TOKENS = 4096  # shorter prompts use fewer repeats


@dataclass(frozen=True)
class CommonWords(Family):
    """`common` words that occur more often than all others, and one worked example."""

    template_name: ClassVar[str] = "common_words_extraction"
    max_new_tokens: ClassVar[int] = 120

    common: int = 10
    common_repeats: int = 30
    other_repeats: int = 3

    def draft(self, shop: Workshop, rng: Random, length_tokens: int, number: int) -> Draft:
        prompt, prefix = shop.materials.template(self.template_name)
        long = length_tokens >= _LONG_TOKENS
        repeats = (self.common_repeats, self.other_repeats) if long else (6, 1)
        shot_size, shot_repeats = (40, (10, 3)) if long else (20, (3, 1))
        solved, order = rng.sample(shop.pool, shot_size), rng.sample(shop.pool, len(shop.pool))
        shot = prompt.format(context=self._list(solved, shot_repeats, rng), query="") + prefix
        shot = f"{shot} {_numbered(solved[: self.common])}\n"
        places = replayed(rng)
        return Draft(
            message=lambda size: shot + prompt.format(context=self._list(order[:size], repeats, places()), query=""),
            question=what_follows(prompt, "context", query=""),
            answer_prefix=prefix,
            references=tuple(order[: self.common]),
            smallest=self.common + 1,
            largest=len(order),
            unit_tokens=repeats[1] * 6.0,
        )

    def _list(self, words: list[str], repeats: tuple[int, int], rng: Random) -> str:
        listed = words[: self.common] * repeats[0] + words[self.common :] * repeats[1]
        rng.shuffle(listed)
        return _numbered(listed)


@dataclass(frozen=True)
class FrequentWords(Family):
    """Made-up words whose frequencies fall with the square of their rank; the most frequent one is noise."""

    template_name: ClassVar[str] = "freq_words_extraction"
    max_new_tokens: ClassVar[int] = 50

    letters: int = 6
    asked: int = 3

    def draft(self, shop: Workshop, rng: Random, length_tokens: int, number: int) -> Draft:
        prompt, prefix = shop.materials.template(self.template_name)
        coded: dict[str, None] = {"...": None}
        while len(coded) < (length_tokens - self.max_new_tokens) // 50:
            coded["".join(rng.choices(string.ascii_lowercase, k=self.letters))] = None
        words, places = list(coded), replayed(rng)

        def text(size: int) -> str:
            # The zeta distribution with exponent 2, whose normalisation is pi^2 / 6.
            counts = (int(size / (math.pi**2 / 6) / rank**2) for rank in range(1, len(words) + 1))
            drawn = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
            places().shuffle(drawn)
            return " ".join(drawn)

        return Draft(
            message=lambda size: prompt.format(context=text(size), query=""),
            question=what_follows(prompt, "context", query=""),
            answer_prefix=prefix,
            references=tuple(words[1 : 1 + self.asked]),
            smallest=100,  # below, the third and fourth rank could be equally frequent
            unit_tokens=2.0,
        )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
