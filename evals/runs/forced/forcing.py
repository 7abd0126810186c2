"""How a continuation is fed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Forcing:
    """How many tokens every method is fed, and whether one by one as in decoding instead of all at once."""

    tokens: int
    one_by_one: bool = False
