"""Needles in a haystack, RULER's way: keys with values, hidden in essays, noise or other needles."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import ClassVar

from evals.common.asking.question import what_follows
from evals.ruler.families.family import Family, Workshop, replayed
from evals.ruler.families.fitting import Draft

_DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent


@dataclass(frozen=True)
class Niah(Family):
    """haystack: essay, noise or needle · keys, values per key and queries: how many."""

    template_name: ClassVar[str] = "niah"
    max_new_tokens: ClassVar[int] = 128

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def draft(self, shop: Workshop, rng: Random, length_tokens: int, number: int) -> Draft:
        keys = _distinct(self.key_kind, max(self.keys, self.queries), shop, rng)
        values = _distinct(self.value_kind, len(keys) * self.values, shop, rng)
        owned = {key: values[i * self.values : (i + 1) * self.values] for i, key in enumerate(keys)}
        form = shop.materials.sentence("needle")
        needles = [
            form.format(type_needle_v=self.value_kind, key=key, value=value)
            for key, its in owned.items()
            for value in its
        ]
        rng.shuffle(needles)
        asked = rng.sample(keys, self.queries)
        template, prefix = shop.materials.template(self.template_name)
        kind = self.value_kind
        if self.queries * self.values == 1:
            template, prefix, kind = _singular(template), _singular(prefix), kind.removesuffix("s")
        fields = {"type_needle_v": kind, "query": _listed(asked)}
        places, lines = replayed(rng), replayed(rng)

        def line(other: Random) -> str:
            while (key := _one(self.key_kind, shop, other)) in owned:
                pass  # a second needle with the asked key would make the answer ambiguous
            return form.format(type_needle_v=self.value_kind, key=key, value=_one(self.value_kind, shop, other))

        def context(size: int) -> str:
            if self.haystack == "essay":
                return _in_sentences(shop.materials.essay.sentences(size), needles, places())
            source = lines()
            hay = [line(source) if self.haystack == "needle" else shop.materials.sentence("noise") for _ in range(size)]
            return _in_lines(hay, needles, places())

        return Draft(
            message=lambda size: template.format(context=context(size), **fields),
            question=what_follows(template, "context", **fields),
            answer_prefix=prefix.format(**fields),
            references=tuple(value for key in asked for value in owned[key]),
            smallest=len(needles),
            unit_tokens={"essay": 1.3, "noise": 26.0, "needle": 24.0}[self.haystack],
        )


def _in_sentences(sentences: list[str], needles: list[str], rng: Random) -> str:
    """Needles between sentences, at random depths out of forty."""
    depths = sorted(rng.sample(_DEPTHS, len(needles)))
    cuts = [0, *(int(len(sentences) * depth / 100) for depth in depths), len(sentences)]
    parts: list[str] = []
    for needle, (start, end) in zip([*needles, ""], pairwise(cuts), strict=True):
        parts += [" ".join(sentences[start:end]), needle]
    return " ".join(parts[:-1])


def _in_lines(lines: list[str], needles: list[str], rng: Random) -> str:
    """Needles on lines of their own, at random places."""
    for place, needle in zip(sorted(rng.sample(range(len(lines)), len(needles)), reverse=True), needles, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def _one(kind: str, shop: Workshop, rng: Random) -> str:
    """A word pair, a number of seven digits or a UUID."""
    if kind == "words":
        # Drawing both parts apart is drawing from all pairs, without the gigabyte that listing them takes.
        return f"{rng.choice(shop.adjectives)}-{rng.choice(shop.nouns)}"
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _distinct(kind: str, count: int, shop: Workshop, rng: Random) -> list[str]:
    made: dict[str, None] = {}
    while len(made) < count:
        made[_one(kind, shop, rng)] = None
    return list(made)


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def _singular(text: str) -> str:
    """The template for one value, by the same replacements as the original's."""
    for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(plural, singular)
    return text
