"""Two implementations of one method: the reference, and a fast one of fixed shapes."""

from __future__ import annotations

from shadowkv.common.names import did_you_mean
from shadowkv.contract.setting import require
from shadowkv.kernels.backend import has_triton

ENGINES = ("auto", "reference", "fast")


def check_engine(method: str, engine: str) -> None:
    """Raise `SkvError` for an engine that there is not."""
    known = engine in ENGINES
    require(known, f"{method}: engine={engine} is unknown{did_you_mean(engine, ENGINES)}; one of {', '.join(ENGINES)}")


def means_fast(engine: str, device: str) -> bool:
    """Which engine a parameter asks for on a device of this type, whatever is installed here."""
    return engine == "fast" or (engine == "auto" and device == "cuda")


def uses_fast(engine: str, device: str, *, copied: bool = False) -> bool:
    """Which engine it gets: `auto` goes without Triton where there is none, and copies no prompt that stays anyway.

    copied: whether the fast engine would hold a prompt's keys and values a second time.
    """
    return engine == "fast" or (means_fast(engine, device) and has_triton() and not copied)
