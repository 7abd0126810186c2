"""How much of what a step needs the step before has left on the device: what a plan has to assume."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def hit_rate(step: Callable[[], None], resident: Callable[[], Sequence[Tensor]], steps: int) -> float | None:
    """Share of the chunks chosen in a step that were there already, over `steps` of them, all layers, rows and heads.

    resident: chunk numbers by slot, -1 for none, as they are at that moment (`DecodeCache.resident_chunks`). None where
    nothing stays.
    """
    needed = found = 0
    for _ in range(steps if resident() else 0):
        before = [held.clone() for held in resident()]
        step()
        for was, held in zip(before, resident(), strict=True):
            # Every chunk that is held after a step was chosen in it.
            used = held >= 0
            needed += int(used.sum())
            found += int((used & (held == was)).sum())
    return found / needed if needed else None
