"""Variable tracking: which variables end up with a value that is handed on through a chain of assignments?"""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import ClassVar

from evals.common.asking.question import what_follows
from evals.common.seeding import seeded
from evals.ruler.families.family import Family, Workshop, replayed
from evals.ruler.families.fitting import Draft

_SHOT_TOKENS = 500
_SHOT_STEP_LINES = 5


@dataclass(frozen=True)
class VariableTracking(Family):
    """One chain of `hops` copies, and one worked example before it."""

    template_name: ClassVar[str] = "variable_tracking"
    max_new_tokens: ClassVar[int] = 30

    hops: int = 4

    def draft(self, shop: Workshop, rng: Random, length_tokens: int, number: int) -> Draft:
        names = _names(self.hops + 1, 5, rng)
        value = str(rng.randint(10000, 99999))
        prompt, prefix = shop.materials.template(self.template_name)
        fields = {"query": value, "num_v": str(len(names))}
        shot, places = self._shot(shop, rng), replayed(rng)
        return Draft(
            message=lambda size: shot + prompt.format(context=_chained(shop, names, value, size, places()), **fields),
            question=what_follows(prompt, "context", **fields),
            answer_prefix=prefix.format(**fields),
            references=tuple(names),
            smallest=len(names),
            unit_tokens=26.0,
        )

    def _shot(self, shop: Workshop, rng: Random) -> str:
        """A solved puzzle of 500 tokens: always the same text, with names and a value of this sample's own."""
        names, value = _names(self.hops + 1, 3, rng), str(rng.randint(10000, 99999))
        template = "".join(shop.materials.template(self.template_name))

        def puzzle(lines: int) -> str:
            places = seeded("ruler", shop.seed, "shot of variable tracking", lines)
            filled = template.format(
                context=_chained(shop, names, value, lines, places), query=value, num_v=str(len(names))
            )
            return f"{filled} {' '.join(names)}\n\n"

        lines = _SHOT_STEP_LINES
        while shop.tokens_of(puzzle(lines + _SHOT_STEP_LINES)) <= _SHOT_TOKENS:
            lines += _SHOT_STEP_LINES
        return puzzle(lines)


def _chained(shop: Workshop, names: list[str], value: str, size: int, rng: Random) -> str:
    """Noise lines with the chain's assignments among them, in their order."""
    lines = [shop.materials.sentence("noise")] * size
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
    for moved, (place, assignment) in enumerate(zip(sorted(rng.sample(range(size), len(chain))), chain, strict=True)):
        lines.insert(place + moved, assignment)
    return "\n".join(lines)


def _names(count: int, letters: int, rng: Random) -> list[str]:
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(made)
