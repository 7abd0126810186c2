"""The five kinds of RULER task: each drafts samples, whose haystacks are sized afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import ClassVar

from evals.ruler.families.fitting import Draft
from evals.ruler.materials import Materials


class Workshop:
    """What drafting needs besides random numbers: materials and a tokenizer, with the costly parts made once."""

    def __init__(self, materials: Materials, tokens_of: Callable[[str], int], seed: int) -> None:
        self.materials = materials
        self.tokens_of = tokens_of  # text -> its number of tokens, without any template
        self.seed = seed

    @cached_property
    def adjectives(self) -> list[str]:
        return self.materials.words("adjective")

    @cached_property
    def nouns(self) -> list[str]:
        return self.materials.words("noun")

    @cached_property
    def pool(self) -> list[str]:
        """Nouns, adjectives and verbs together, sorted."""
        return sorted({*self.nouns, *self.adjectives, *self.materials.words("verb")})


@dataclass(frozen=True)
class Family(ABC):
    """A kind of task with its parameters."""

    template_name: ClassVar[str]
    max_new_tokens: ClassVar[int]

    @abstractmethod
    def draft(self, shop: Workshop, rng: Random, length_tokens: int, number: int) -> Draft:
        """Sample `number` of a task. All randomness comes from `rng`, which is the sample's own."""

    def count(self, shop: Workshop) -> int | None:
        """How many different samples there are, None for any number."""
        return None


def replayed(rng: Random) -> Callable[[], Random]:
    """Makes generators that all give the same numbers: a sample measured at several sizes stays the same sample."""
    seed = rng.getrandbits(64)
    return lambda: Random(seed)
