"""What the needle says, what is asked, and how the answer is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from evals.common import metrics
from evals.common.literals import literals
from evals.common.seeding import seeded
from evals.common.sources import essays_folder
from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean

_PLACES = (
    "Aberdeen,Bergen,Cordoba,Dakar,Edmonton,Fukuoka,Gdansk,Hobart,Izmir,Jaipur,Kampala,Leipzig,Marseille,Nagoya,"
    "Odense,Porto,Quito,Riga,Santiago,Tampere,Utrecht,Valencia,Windhoek,Xiamen,Yerevan,Zagreb"
).split(",")


@dataclass(frozen=True)
class Needle:
    """A fact, the question about it, the start of the answer, and what a right answer contains."""

    fact: str
    question: str
    answer_prefix: str
    reference: str


class Protocol(ABC):
    """A way to play the game."""

    name: ClassVar[str]
    instruction: ClassVar[str]
    scoring: ClassVar[str]
    needs: ClassVar[str | None] = None  # a pack that it is read from

    @abstractmethod
    def needle(self, seed: int, length_tokens: int, depth: float, round_: int) -> Needle:
        """The needle of one cell; depends on these four and nothing else."""

    def needles(self, seed: int, length_tokens: int, depth: float, round_: int, count: int) -> list[Needle]:
        """Several needles that cannot be taken for each other. Raises `SkvError` if there are not that many."""
        raise SkvError(f"the protocol {self.name} has one needle only; --turns takes magic-number")

    @abstractmethod
    def score(self, prediction: str, reference: str) -> float: ...


class MagicNumber(Protocol):
    """A seven-digit number tied to a place; scored by containment of the number."""

    name = "magic-number"
    instruction = "Read the text below. A magic number of a place is hidden in it; remember that number."
    scoring = "1 if the answer contains the number (not as part of a longer one), else 0"

    def needle(self, seed: int, length_tokens: int, depth: float, round_: int) -> Needle:
        rng = seeded("magic-number", seed, length_tokens, depth, round_)
        return self._about(rng.choice(_PLACES), str(rng.randint(10**6, 10**7 - 1)))

    def needles(self, seed: int, length_tokens: int, depth: float, round_: int, count: int) -> list[Needle]:
        if count > len(_PLACES):
            raise SkvError(f"--turns must be at most {len(_PLACES)}, got {count}")
        rng = seeded("magic-number turns", seed, length_tokens, depth, round_)
        places, numbers = rng.sample(_PLACES, count), rng.sample(range(10**6, 10**7), count)
        return [self._about(place, str(number)) for place, number in zip(places, numbers, strict=True)]

    def _about(self, place: str, number: str) -> Needle:
        return Needle(
            fact=f"The magic number of {place} is {number}.",
            question=f"What is the magic number of {place} that the text mentions? Answer with the number only.",
            answer_prefix=f"The magic number of {place} is",
            reference=number,
        )

    def score(self, prediction: str, reference: str) -> float:
        return metrics.contains_number(prediction, reference)


class Kamradt(Protocol):
    """Kamradt's original fact and question, read from the pulled package; scored by containment of its key words.

    The original is graded from 1 to 10 by a language model; this scoring needs none and is not the same scale.
    """

    name = "kamradt"
    needs = "essays"
    instruction = "Answer the question at the end from the text below, in one short sentence."
    scoring = "1 if the answer names the park of the needle, else 0 (the original asks a language model for a grade)"
    _key = "Dolores Park"

    def needle(self, seed: int, length_tokens: int, depth: float, round_: int) -> Needle:
        settings = literals(essays_folder() / "run.py")
        try:
            fact, question = (settings[name][0].strip() for name in ("needle", "retrieval_question"))
        except (KeyError, AttributeError):
            raise SkvError("the pulled essays lack Kamradt's needle; run 'skv pull essays --force'") from None
        return Needle(fact, question, "", self._key)

    def score(self, prediction: str, reference: str) -> float:
        return metrics.contains_text(prediction, reference)


PROTOCOLS: dict[str, type[Protocol]] = {cls.name: cls for cls in (MagicNumber, Kamradt)}


def find_protocol(name: str) -> Protocol:
    """The protocol called `name`."""
    if name not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise SkvError(f"unknown protocol '{name}'{did_you_mean(name, PROTOCOLS)}; protocols: {known}")
    return PROTOCOLS[name]()
