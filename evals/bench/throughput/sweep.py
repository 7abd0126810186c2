"""The spine of a sweep: contexts, then batches ascending, then repeats, in each of which the methods take turns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evals.bench.engines import Contender
from evals.bench.measuring import Batches, Bench
from evals.bench.records import BenchRecord, Cell
from evals.runs.results import RunFolder
from evals.tables.summary import REFERENCE


@dataclass(frozen=True)
class Plan:
    """What to measure. Without `batches`, 1, 2, 4, ... up to `max_batch`, or with `find_max` the largest of each."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...] | None
    repeats: int
    max_batch: int
    find_max: bool = False

    @property
    def ladder(self) -> tuple[int, ...]:
        """Batches that every method is tried at, ascending."""
        if self.batches is not None:
            return self.batches
        return () if self.find_max else doublings(self.max_batch)


class SweepStep(NamedTuple):
    """Progress: measurements finished of those known of, and the one just made."""

    done: int
    total: int
    record: BenchRecord | None


def run_sweep(
    bench: Bench,
    contenders: Sequence[Contender],
    plan: Plan,
    folder: RunFolder[BenchRecord],
    on_step: Callable[[SweepStep], None] = lambda _: None,
) -> None:
    """Measure every cell that the folder does not hold yet; a method is done with a context once one fails."""
    _Sweep(bench, contenders, plan, folder, on_step).run()


class _Sweep:
    def __init__(
        self,
        bench: Bench,
        contenders: Sequence[Contender],
        plan: Plan,
        folder: RunFolder[BenchRecord],
        on_step: Callable[[SweepStep], None],
    ) -> None:
        self._bench, self._plan, self._folder, self._on_step = bench, plan, folder, on_step
        self._contenders = {contender.label: contender for contender in contenders}
        self._done = 0
        self._total = len(plan.contexts) * len(plan.ladder) * plan.repeats * len(contenders)

    def run(self) -> None:
        self._on_step(SweepStep(0, self._total, None))
        for context in self._plan.contexts:
            self._climb(context)
            if self._plan.find_max:
                self._largest(context)

    def _climb(self, context: int) -> None:
        """Every batch of the ladder, each method until it fails."""
        failed: set[str] = set()
        ladder, repeats = self._plan.ladder, self._plan.repeats
        for place, batch in enumerate(ladder):
            labels = [label for label in self._contenders if label not in failed]
            for cell, record in self._repeated(labels, context, batch, failed):
                if record.status != "ok":
                    failed.add(cell.method)
                    self._total -= repeats * (len(ladder) - place) - cell.repeat - 1

    def _repeated(
        self, labels: Sequence[str], context: int, batch: int, left_out: Collection[str] = ()
    ) -> Iterator[tuple[Cell, BenchRecord]]:
        """All repeats at one batch: methods take turns, those at least whose batches can stand side by side.

        left_out: methods that are passed over from the moment that they are in it.
        """
        groups = self._groups(labels, context, batch)
        for group in groups:
            with self._bench.batches(group if len(groups) > 1 else None) as batches:
                for cell in ladder_cells(group, context, (batch,), self._plan.repeats):
                    if cell.method not in left_out:
                        yield cell, self._record(cell, batches)

    def _groups(self, labels: Sequence[str], context: int, batch: int) -> list[list[str]]:
        """Methods that take turns: all of them where each repeat builds anew, else as many as fit side by side."""
        bench = self._bench
        if min(bench.repeats_of_a_build(context), self._plan.repeats) == 1:
            return [list(labels)]
        groups = list[list[str]]()
        for label in labels:
            own = self._contenders[label]
            for group in groups:
                everyone = [self._contenders[other] for other in group] + [own]
                together = [contender.method for contender in everyone]
                if all(contender.stays for contender in everyone) and bench.room.fits_together(
                    together, context, batch, bench.new_tokens
                ):
                    group.append(label)
                    break
            else:
                groups.append([label])
        return groups

    def _largest(self, context: int) -> None:
        """Each method's largest batch, then all repeats there, and at full attention's largest one."""
        found = {}
        for label, contender in self._contenders.items():
            guess = self._bench.room.largest_batch(
                contender.method, context, self._bench.new_tokens, self._plan.max_batch
            )
            found[label] = largest_fitting(lambda batch, label=label: self._fits(label, context, batch), guess,  # type: ignore[misc]
                                           self._plan.max_batch)  # fmt: skip
        shared = found.get(REFERENCE, 0)
        wanted = {label: {batch, min(batch, shared)} - {0} for label, batch in found.items()}
        for batch in sorted({batch for batches in wanted.values() for batch in batches}):
            labels = [label for label, batches in wanted.items() if batch in batches]
            for _ in self._repeated(labels, context, batch):
                pass
        # A method's own largest batch is measured in its own turn: no other method need fit there.

    def _fits(self, label: str, context: int, batch: int) -> bool:
        return self._record(Cell(label, context, batch, 0)).status == "ok"

    def _record(self, cell: Cell, batches: Batches | None = None) -> BenchRecord:
        """The cell's record: the one there is, or a new one."""
        if not self._folder.has(cell):
            self._folder.append(self._bench.measure(self._contenders[cell.method], cell, batches))
        self._done += 1
        self._total = max(self._total, self._done)  # a search does not know how long it will be
        record = self._folder.records[cell]
        self._on_step(SweepStep(self._done, self._total, record))
        return record


def ladder_cells(labels: Sequence[str], context: int, batches: Sequence[int], repeats: int) -> Iterator[Cell]:
    """Cells in the order they are measured: within a repeat methods take turns, and another one begins each time.

    What drifts (clocks, temperature, load) then drifts for all methods alike.
    """
    for batch in batches:
        for repeat in range(repeats):
            first = repeat % max(len(labels), 1)
            for label in (*labels[first:], *labels[:first]):
                yield Cell(label, context, batch, repeat)


def doublings(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `most`."""
    return tuple(2**power for power in range(most.bit_length()))


def largest_fitting(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest n in 1..most with fits(n), 0 if there is none, for a test that fails from some n on.

    Steps away from the guess double until both sides of the limit are known, then the gap is halved: a guess that is
    right takes two tests.
    """
    low, high, step = 0, most + 1, 1
    trial = min(max(guess, 1), most)
    while high - low > 1:
        if fits(trial):
            low = trial
            trial = low + step if high > most else (low + high) // 2
        else:
            high = trial
            trial = high - step if low == 0 else (low + high) // 2
        step *= 2
        trial = min(max(trial, low + 1), high - 1)
    return low
