"""Answers that are drawn: which random numbers each gets, and what it is called.

The numbers belong to a prompt and the number of its answer, not to a method: every method is given the same ones. A
method's own scores are none the worse for it, since each answer is drawn by its own probabilities; but two methods then
differ by what they do and no longer by what they drew, so fewer prompts tell them apart. A method that loses nothing
gives the very answers of full attention.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evals.common.seeding import seeded

if TYPE_CHECKING:
    from torch import Tensor

    from shadowkv.engine.sampling import Choose

_NUMBERED = re.compile(r",answer=(\d+)$")


def answer_name(sample: str, number: int) -> str:
    """What answer `number`, from 1, to a prompt is called among a run's samples."""
    return f"{sample},answer={number}"


def prompt_name(sample: str) -> str:
    """The prompt that an answer is to; of a greedy answer, whose sample is its prompt, the same."""
    return _NUMBERED.sub("", sample)


@dataclass(frozen=True)
class Draw:
    """How the tokens of one answer are drawn. `key` is all that its random numbers depend on."""

    temperature: float
    top_p: float
    key: tuple[object, ...]

    def chooser(self) -> Choose:
        """Chooses one token after the other, of one row; the n-th by the n-th number of the key's stream."""
        import torch  # here, so that what only reads records needs none

        from shadowkv.engine.sampling import drawn

        stream = seeded(*self.key)

        def choose(logits: Tensor) -> Tensor:
            return drawn(logits, torch.tensor([stream.random()], dtype=torch.float64), self.temperature, self.top_p)

        return choose
