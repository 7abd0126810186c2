"""How sure a mean is: bootstrap intervals over samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 2000
BOOTSTRAP_95 = f"95 % percentile bootstrap over the samples of each task, {_RESAMPLES:,} resamples"


def mean_of_means(groups: Sequence[Sequence[float]]) -> float | None:
    """The mean over groups of their means, None without any score; a group without scores does not count."""
    means = [float(np.mean(group)) for group in groups if len(group)]
    return float(np.mean(means)) if means else None


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """The mean of the values that there are, None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile, None of nothing."""
    return float(np.percentile(values, q)) if values else None


def interval_95(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Percentile bootstrap interval of `mean_of_means`: samples are drawn anew within each group.

    None where there is nothing to draw from: no group of at least two samples. Always the same for the same scores.
    """
    held = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not any(len(group) > 1 for group in held):
        return None
    rng = np.random.default_rng(0)
    drawn = [group[rng.integers(len(group), size=(_RESAMPLES, len(group)))].mean(axis=1) for group in held]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return float(low), float(high)
