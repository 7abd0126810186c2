"""What differences of paired samples say: how likely chance alone makes them, and how far they may be off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evals.tables.statistics import interval_95, mean_of_means

_PERMUTATIONS = 9_999  # at least; more where more tests share the error rate
_PERMUTATIONS_PER_TEST = 100  # leaves p-values that Holm's first step can accept
_PERMUTATIONS_AT_ONCE = 1_000


@dataclass(frozen=True)
class Paired:
    """Score differences, current less baseline, of the same samples; one group per cell, each of at least one."""

    groups: Sequence[Sequence[float]]

    @cached_property
    def _shares(self) -> npt.NDArray[np.float64]:
        """What each sample adds to the difference, which is the mean over cells of their means."""
        parts = [np.asarray(group, dtype=float) / (len(group) * len(self.groups)) for group in self.groups]
        return np.concatenate(parts) if parts else np.zeros(0)

    @property
    def samples(self) -> int:
        return len(self._shares)

    @property
    def difference(self) -> float | None:
        return mean_of_means(self.groups)

    @property
    def wins(self) -> int:
        return int((self._shares > 0).sum())

    @property
    def losses(self) -> int:
        return int((self._shares < 0).sum())

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % paired-bootstrap interval of the difference: samples are drawn anew within each cell."""
        return interval_95(self.groups)

    @property
    def guarded_error(self) -> float:
        """Standard error of the difference, with one imagined full win and one full loss more.

        Those two keep samples without any change from claiming that there can be none: as a rule of three does.
        """
        cells = [float(np.var(group)) / len(group) for group in self.groups]
        return float(np.sqrt(sum(cells) / len(cells) ** 2 + 2 / self.samples**2))

    def p_value(self, tests: int = 1) -> float:
        """Two-sided chance of such a difference where both runs are alike, of `tests` tests in all.

        Where all changes weigh the same, as those of right and wrong answers do, it is the exact McNemar (sign) test;
        otherwise a permutation test, which swaps the two runs sample by sample. No assumption on the scores.
        """
        from scipy.stats import binomtest, permutation_test

        changes = self._shares[self._shares != 0]
        if not len(changes):
            return 1.0
        if np.allclose(np.abs(changes), abs(changes[0]), rtol=1e-9, atol=0):
            return float(binomtest(int((changes > 0).sum()), len(changes), 0.5).pvalue)
        resamples = max(_PERMUTATIONS, _PERMUTATIONS_PER_TEST * tests)
        found = permutation_test(
            (changes,),
            np.sum,
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            batch=_PERMUTATIONS_AT_ONCE,
            rng=np.random.default_rng(0),
        )
        return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values as they count where so many are looked at: any of them below 5 % by chance in 5 % of comparisons.

    Holm, Scand. J. Statist. 6 (1979). Here because scipy has none, and statsmodels' collects garbage on each call.
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=float)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(p) for p in corrected]
