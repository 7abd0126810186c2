"""What a comparison is made of: one judged row per metric, method and place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evals.compare.gate import Gate
from evals.compare.verdicts import Verdict


@dataclass(frozen=True)
class Judged:
    """What every row says: which metric, of what, and what is known of its change."""

    metric: str  # accuracy, fidelity, throughput or memory
    method: str
    place: str  # the cell: task @ length, context x batch; or what is averaged
    verdict: Verdict
    more_needed: int | None  # samples or repeats, where undecided for want of them
    why: str  # what the numbers do not say

    def fails(self, gate: Gate) -> bool:
        """Whether this row alone fails a build."""
        return self.verdict is Verdict.WORSE and self.metric in gate.failing


@dataclass(frozen=True)
class ScoreRow(Judged):
    """Scores of one cell, or of one method over its cells. Unscored answers are in no mean; means are of pairs."""

    samples: int  # scored in both runs
    before: float | None
    after: float | None
    difference: float | None
    low: float | None  # 95 % paired bootstrap
    high: float | None
    wins: int
    losses: int
    changed: int  # samples whose text differs
    lost: int  # scored before; now failed, or not answered though asked
    found: int  # not scored before, scored now
    p: float | None
    p_holm: float | None


@dataclass(frozen=True)
class DivergenceRow(Judged):
    """Distances from full attention of one method in one cell; means are over prompts that both runs hold."""

    samples: int  # prompts in both
    tokens: int  # of each of them, compared
    before: float | None  # KL in nats per token
    after: float | None
    change: float | None  # of the KL, as a share of what it was (or of the least that counts)
    low: float | None  # 95 % paired bootstrap over prompts
    high: float | None
    top1_before: float | None
    top1_after: float | None
    nll_change: float | None  # nats per token
    moved: int  # prompts whose distances differ at all
    lost: int  # there before; now failed, or not there though asked
    found: int
    p: float | None
    p_holm: float | None


@dataclass(frozen=True)
class RatioRow(Judged):
    """A speed or a size, current over baseline."""

    what: str
    before: float | None
    after: float | None
    ratio: float | None
    low: float | None
    high: float | None
    spread_before: float | None  # half of what lies between the lowest and the highest repeat, as a share
    spread_after: float | None
    repeats: int  # of the side that has fewer; of sizes in answers, samples
    p: float | None
    p_holm: float | None


@dataclass(frozen=True)
class Comparison:
    """Two runs compared."""

    baseline: str
    current: str
    title: str
    gate: Gate
    scores: Sequence[ScoreRow]
    ratios: Sequence[RatioRow]
    notes: Sequence[str]
    divergences: Sequence[DivergenceRow] = ()

    @property
    def rows(self) -> list[Judged]:
        return [*self.scores, *self.divergences, *self.ratios]

    @property
    def failures(self) -> list[Judged]:
        return [row for row in self.rows if row.fails(self.gate)]
