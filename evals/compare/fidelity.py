"""Two runs of forced continuations: distances from full attention after the same tokens, paired prompt by prompt.

Tokens of one prompt are no independent samples. What is judged is each prompt's mean KL, so that a prompt counts once
however many tokens were fed: its change from one run to the other, by permutation and bootstrap over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evals.common.asking.question import shown
from evals.common.grouping import grouped
from evals.compare.accuracy import size_row
from evals.compare.gate import FIDELITY, Gate
from evals.compare.paired import Paired, holm
from evals.compare.rows import Comparison, DivergenceRow, RatioRow
from evals.compare.sides import (
    Side,
    differing_circumstances,
    refuse_other_questions,
    same_bytes,
    shared_methods,
)
from evals.compare.verdicts import Decision, Verdict, judge, open_question
from evals.runs.forced.record import ForcedRecord
from evals.runs.results import Key
from evals.tables.table import tokens
from shadowkv.common.errors import SkvError

LEAST_KL = 1e-4  # nats per token: changes are shares of the KL, and of this where it is less


@dataclass(frozen=True)
class Divergences:
    """One cell of one method in both runs."""

    pairs: Sequence[tuple[ForcedRecord, ForcedRecord]]
    lost: int = 0
    found: int = 0

    @cached_property
    def before(self) -> float:
        return float(np.mean([before.mean_kl for before, _ in self.pairs]))

    @cached_property
    def changes(self) -> Paired:
        """By prompt, as shares of the baseline's mean; positive is farther from full attention."""
        scale = max(self.before, LEAST_KL)
        return Paired([[(after.mean_kl - before.mean_kl) / scale for before, after in self.pairs]])

    @property
    def moved(self) -> int:
        return sum(before.kl != after.kl or before.nll != after.nll for before, after in self.pairs)

    def mean(self, side: int, value: Callable[[ForcedRecord], float]) -> float:
        """Over the prompts of the baseline (0) or the current run (1)."""
        return float(np.mean([value(pair[side]) for pair in self.pairs]))


def compare_forced(baseline: Side[ForcedRecord], current: Side[ForcedRecord], gate: Gate) -> Comparison:
    """Compare two runs. Raises `SkvError` where they did not feed the same tokens after the same prompts."""
    notes: list[str] = []
    refuse_other_questions(baseline, current)
    methods = shared_methods(baseline, current, notes)
    cells = _cells(baseline, current, methods, notes)
    notes += differing_circumstances(baseline, current)
    sizes = _sizes(cells, gate) if same_bytes(baseline, current) else []
    title = current.manifest.title
    rows = _rows(cells, gate)
    return Comparison(baseline.described, current.described, title, gate, [], sizes, notes, rows)


_Cell = tuple[str, str, int, str]  # method, task, length, where the question stands


def _cells(
    baseline: Side[ForcedRecord], current: Side[ForcedRecord], methods: Sequence[str], notes: list[str]
) -> dict[_Cell, Divergences]:
    before, after = ({r.key: r for r in side.records if r.method in methods} for side in (baseline, current))
    if not before.keys() & after.keys():
        raise SkvError("no prompt in common: the runs hold other samples, tasks or lengths")
    placed = [side.manifest.config.get("question") for side in (baseline, current)]
    alike = baseline.manifest.selection == current.manifest.selection and placed[0] == placed[1]
    for side, own, other in ((baseline, before, after), (current, after, before)):
        alone = len(own.keys() - other.keys())
        if alone and not (alike and side is baseline):
            notes.append(f"{alone} records are only in {side.name} and left out")
    asked = [key for key in before if alike or key in after]
    cells = grouped(asked, lambda key: (key.method, key.task, key.length, key.question))
    return {cell: _divergences(keys, before, after) for cell, keys in cells.items()}


def _divergences(keys: Sequence[Key], before: dict[Key, ForcedRecord], after: dict[Key, ForcedRecord]) -> Divergences:
    had = [key for key in keys if before[key].final]
    has = {key for key in keys if key in after and after[key].final}
    pairs = [(before[key], after[key]) for key in had if key in has]
    return Divergences(pairs, lost=len(had) - len(pairs), found=len(has) - len(pairs))


def decide_divergences(cells: Sequence[Divergences], tolerance: float) -> list[Decision]:
    """Verdicts that share one error rate; the tolerance is a share of the baseline's KL."""
    moved = [cell for cell in cells if cell.moved]  # what is equal to the last digit is no test
    p_values = [cell.changes.p_value(len(moved)) for cell in moved]
    judged = [
        _decide(cell.changes, p, corrected, len(moved), tolerance)
        for cell, p, corrected in zip(moved, p_values, holm(p_values), strict=True)
    ]
    found = iter(judged)
    return [next(found) if cell.moved else _unmoved(cell) for cell in cells]


def _unmoved(cell: Divergences) -> Decision:
    return Decision(Verdict.SAME) if cell.pairs else Decision(Verdict.UNDECIDED, why="no prompt is in both")


def _decide(changes: Paired, p: float, p_holm: float, tests: int, tolerance: float) -> Decision:
    from scipy.stats import t

    assert changes.difference is not None
    if changes.samples < 2:
        return Decision(Verdict.UNDECIDED, p, p_holm, why="one prompt says nothing of the spread")
    deviation = float(np.std(changes.groups[0], ddof=1))
    half_width = float(t.ppf(0.975, changes.samples - 1)) * deviation / changes.samples**0.5
    verdict = judge(-changes.difference, half_width, p_holm, tolerance, alike=False)
    return open_question(Decision(verdict, p, p_holm), deviation, changes.samples, tests, tolerance)


def _rows(cells: dict[_Cell, Divergences], gate: Gate) -> list[DivergenceRow]:
    decisions = decide_divergences(list(cells.values()), gate.tolerances[FIDELITY])
    return [_row(cell, found, decision) for (cell, found), decision in zip(cells.items(), decisions, strict=True)]


def _row(cell: _Cell, found: Divergences, decision: Decision) -> DivergenceRow:
    method, task, length, question = cell
    if found.lost:
        decision = decision._replace(verdict=Verdict.WORSE, more_needed=None, why=f"{found.lost} prompts lost")
    some = bool(found.pairs)
    interval = found.changes.interval if some else None
    top1 = [found.mean(side, lambda r: float(np.mean(r.top1))) if some else None for side in (0, 1)]
    return DivergenceRow(
        metric=FIDELITY,
        method=method,
        place=shown(f"{task} @ {tokens(length)}", question),
        verdict=decision.verdict,
        more_needed=decision.more_needed,
        why=decision.why,
        samples=len(found.pairs),
        tokens=sum(len(after.kl) for _, after in found.pairs),
        before=found.before if some else None,
        after=found.mean(1, lambda r: r.mean_kl) if some else None,
        change=found.changes.difference if some else None,
        low=interval and interval[0],
        high=interval and interval[1],
        top1_before=top1[0],
        top1_after=top1[1],
        nll_change=found.mean(1, lambda r: r.more_nll) - found.mean(0, lambda r: r.more_nll) if some else None,
        moved=found.moved,
        lost=found.lost,
        found=found.found,
        p=decision.p,
        p_holm=decision.p_holm,
    )


def _sizes(cells: dict[_Cell, Divergences], gate: Gate) -> list[RatioRow]:
    """KV bytes by method and length."""
    rows = []
    for (method, length, question), alike in grouped(cells, lambda cell: (cell[0], cell[2], cell[3])).items():
        pairs = [pair for cell in alike for pair in cells[cell].pairs]
        for what, before, after in (
            ("KV on device", [b.device_bytes for b, _ in pairs], [a.device_bytes for _, a in pairs]),
            ("KV on host", [b.host_bytes for b, _ in pairs], [a.host_bytes for _, a in pairs]),
        ):
            rows += size_row(method, shown(f"@ {tokens(length)}", question), what, before, after, gate)
    return rows
