"""The four verdicts, and how many more samples an open question needs."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from math import ceil
from typing import NamedTuple

from evals.compare.paired import Paired, holm

ALPHA = 0.05  # chance that a comparison of alike runs holds any false `better` or `worse`
POWER = 0.8  # chance, after the samples that are said to be needed, to find a drop as large as the tolerance
_ROUNDING = 1e-9  # ten of 500 samples are a drop of 0.02, whatever floats make of it


class Verdict(StrEnum):
    """What is known of a difference, beside a tolerance."""

    BETTER = "better"
    SAME = "same"
    WORSE = "worse"
    UNDECIDED = "undecided"


class Decision(NamedTuple):
    """A verdict with what led to it."""

    verdict: Verdict
    p: float | None = None
    p_holm: float | None = None
    more_needed: int | None = None  # samples or repeats, where undecided for want of them
    why: str = ""


def decide(found: Sequence[Paired], alike: Sequence[bool], tolerance: float) -> list[Decision]:
    """Verdicts on score differences that share one error rate; `alike` are those in which no answer changed."""
    tests = sum(paired.samples > 0 for paired in found)
    p_values = [paired.p_value(tests) if paired.samples else None for paired in found]
    corrected = iter(holm([p for p in p_values if p is not None]))
    return [
        Decision(Verdict.UNDECIDED, why="no sample is scored in both")
        if p is None
        else _decide(paired, p, next(corrected), tests, tolerance, unchanged)
        for paired, p, unchanged in zip(found, p_values, alike, strict=True)
    ]


def _decide(paired: Paired, p: float, p_holm: float, tests: int, tolerance: float, alike: bool) -> Decision:
    from scipy.stats import norm

    error, difference = paired.guarded_error, paired.difference
    assert difference is not None
    verdict = judge(difference, float(norm.ppf(0.975)) * error, p_holm, tolerance, alike=alike)
    deviation = error * paired.samples**0.5
    return open_question(Decision(verdict, p, p_holm), deviation, paired.samples, tests, tolerance)


def open_question(decision: Decision, deviation: float, samples: int, tests: int, tolerance: float) -> Decision:
    """The decision, and where it is undecided what it would take to decide."""
    if decision.verdict is not Verdict.UNDECIDED:
        return decision
    more = samples_needed(deviation, tolerance, tests) - samples
    return decision._replace(more_needed=more) if more > 0 else decision._replace(why="close to the tolerance")


def judge(change: float, half_width: float, p_holm: float, tolerance: float, *, alike: bool) -> Verdict:
    """The verdict on a change, positive where it is for the better.

    `better` and `worse`: not chance (`p_holm` at most 5 %) and at least as large as the tolerance. `same`: nothing
    changed at all (`alike`), or the change lies within the tolerance with all its 95 % interval (`half_width`).
    """
    if alike:
        return Verdict.SAME
    if p_holm <= ALPHA and abs(change) >= tolerance - _ROUNDING:
        return Verdict.BETTER if change > 0 else Verdict.WORSE
    return Verdict.SAME if abs(change) + half_width < tolerance else Verdict.UNDECIDED


def judge_range(low: float, high: float, tolerance: float) -> Verdict:
    """The verdict on ratios of sizes that hold no chance, by the lowest and the highest; above 1 is worse."""
    if low >= 1 + tolerance - _ROUNDING:
        return Verdict.WORSE
    if high <= 1 - tolerance + _ROUNDING:
        return Verdict.BETTER
    return Verdict.SAME if low > 1 - tolerance and high < 1 + tolerance else Verdict.UNDECIDED


def samples_needed(deviation: float, tolerance: float, tests: int) -> int:
    """Samples that find a drop of `tolerance` with 80 % power, or show with as much that there is none.

    `deviation` is that of one sample's difference. By the normal approximation; the drop at the level that Holm asks
    of the first of `tests` tests.
    """
    from scipy.stats import norm

    drop = float(norm.ppf(1 - ALPHA / (2 * max(tests, 1))) + norm.ppf(POWER))
    none = float(norm.ppf(1 - ALPHA / 2) + norm.ppf((1 + POWER) / 2))  # both sides must hold
    return ceil((max(drop, none) * deviation / tolerance) ** 2)
