"""What measuring a kernel takes: a decode step's sizes, inputs with their calls, and the ways to one result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from evals.bench.kernels.cases import Case
from shadowkv.kernels.slots import Regions

Call = Callable[..., Any]  # takes the tensors that it changes, returns a tensor, tensors or nothing


@dataclass(frozen=True)
class Workload:
    """A decode step of one layer."""

    case: Case
    regions: Regions
    landmarks: int
    misses: int  # slots that every head has to fill
    values: tuple[str, ...]  # codings
    factors: tuple[str, ...]

    def shrunk(self) -> Workload:
        """Few enough tokens, heads and rows for Triton's interpreter; head size, group, chunk and rank as they are."""
        case, chunk = self.case, self.case.chunk
        small = replace(
            case,
            batch=min(case.batch, 2),
            heads=min(case.heads, 2),
            chunks=min(case.chunks, 40),
            slots=min(case.slots, 8),
        )
        regions = Regions(small.slots * chunk, min(self.regions.outliers, 2 * chunk), min(self.regions.ring, 50))
        misses = max(1, round(self.misses / case.slots * small.slots))
        return replace(self, case=small, regions=regions, landmarks=min(self.landmarks, 38), misses=misses)


class NotHereError(Exception):
    """A way to a result that this machine does not have, with the reason in a line."""


class Way(NamedTuple):
    """A way to a result, made when its turn comes; not as a CUDA graph if it asks the host.

    `make` raises `NotHereError` where there is no such way.
    """

    name: str
    make: Callable[[], Sequence[Call]]
    capturable: bool


@dataclass(frozen=True)
class Subject:
    """A kernel with its inputs. Several calls take turns; each is given `changed`, which it may write to."""

    calls: tuple[Call, ...]
    twins: tuple[Call, ...]
    bound: float
    changed: tuple[Tensor, ...] = ()
    moved_bytes: int = 0
    over_link: bool = False
    flop: int = 0
    besides: tuple[Way, ...] = ()  # other ways to the same result
    capturable: bool = True
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], float] | None = None  # in place of `relative_error`


class Item(NamedTuple):
    """A subject by name, made when its turn comes."""

    kernel: str
    variant: str
    make: Callable[[], Subject]
    way: str | None = None  # where it is no kernel
