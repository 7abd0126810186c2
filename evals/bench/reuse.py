"""How much of what a step needs the step before has left on the device: what a plan has to assume."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
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


class MadeHits:
    """A share of hits by decree, for keys that no text made: of noise a step finds there what chance left there.

    Which landmarks win is left as it is, and so is the work of finding them: only, before each step, a share of all
    landmarks is said to stand for chunks that are held, and the others for chunks that are not.
    """

    def __init__(self, share: float, resident: Callable[[], Sequence[Tensor]], numbers: Callable[[], Sequence[Tensor]]):
        """resident, numbers: see `DecodeCache.resident_chunks` and `DecodeCache.chunk_numbers`."""
        self._share, self._resident, self._numbers = share, resident, numbers
        self._known = [number.clone() for number in numbers()]  # every chunk that there is to choose

    @torch.inference_mode()
    def __call__(self) -> None:
        """Make it so for the next step."""
        for held, number, known in zip(self._resident(), self._numbers(), self._known, strict=True):
            if not known.shape[-1]:
                continue
            chunks = int(known.max()) + 1
            there = torch.zeros(*held.shape[:2], chunks + 1, dtype=torch.bool, device=held.device)
            there.scatter_(-1, torch.where(held >= 0, held, chunks).long().clamp(max=chunks), True)
            inside = there.gather(-1, known.long())
            hits = torch.rand(number.shape, device=held.device) < self._share
            number.copy_(torch.where(hits, _drawn(known, inside, number), _drawn(known, ~inside, number)))


def _drawn(known: Tensor, wanted: Tensor, like: Tensor) -> Tensor:
    """Of those wanted, one at random in each place of `like`; any where none is wanted. [B,H,C] each."""
    first = (~wanted).int().argsort(dim=-1, stable=True)  # those wanted come first
    count = wanted.sum(dim=-1, keepdim=True)
    count = torch.where(count > 0, count, wanted.shape[-1])
    place = (torch.rand(like.shape, device=like.device) * count).long().minimum(count - 1)
    return known.gather(-1, first.gather(-1, place))
