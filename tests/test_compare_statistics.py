"""The statistics behind a verdict: right on known cases, and rarely wrong on made-up runs whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from simulate_compare import ALIKE, FALSE, GRADED, comparisons, dropped, false_alarms, share, sweeps

from evals.compare.paired import Paired, holm
from evals.compare.speed import Speed, decide_speeds
from evals.compare.verdicts import Verdict, decide, judge, judge_range, samples_needed

DOCS = Path(__file__).parent.parent / "docs" / "compare.md"


def nominal(runs):
    """The most false alarms that a true rate of 5 % shows in so many runs, but for one time in 1,000."""
    return binom.ppf(0.999, runs, 0.05) / runs


@pytest.mark.parametrize(
    ("losses", "wins", "p"), [(10, 0, 0.001953125), (0, 10, 0.001953125), (9, 1, 0.021484375), (5, 5, 1.0), (0, 0, 1.0)]
)
def test_answers_right_or_wrong_get_the_exact_mcnemar_test(losses, wins, p):
    paired = Paired([[-1.0] * losses + [1.0] * wins + [0.0] * 180])
    assert paired.p_value() == pytest.approx(p)
    assert (paired.wins, paired.losses) == (wins, losses)


def test_unequal_changes_get_the_exact_permutation_test():
    """Of 2^4 swaps, two are as extreme as all four falling."""
    assert Paired([[-0.1, -0.2, -0.3, -0.4, 0.0]]).p_value() == pytest.approx(2 / 16)
    assert Paired([[-0.1, -0.2, 0.3]]).p_value() == pytest.approx(1.0)


def test_a_mean_over_cells_weighs_cells_alike_not_samples():
    paired = Paired([[-1.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    assert paired.difference == pytest.approx(0.0)
    assert paired.samples == 6


def test_holm_is_the_step_down_of_its_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_interval_is_that_of_paired_differences():
    """10 losses of 200: the bootstrap's interval is the binomial's, 4 to 16 losses."""
    low, high = Paired([[-1.0] * 10 + [0.0] * 190]).interval
    assert low == pytest.approx(-0.08, abs=0.01)
    assert high == pytest.approx(-0.02, abs=0.01)


@pytest.mark.parametrize(
    ("change", "half", "p", "alike", "verdict"),
    [
        (-0.05, 0.03, 0.01, False, Verdict.WORSE),
        (+0.05, 0.03, 0.01, False, Verdict.BETTER),
        (-0.02, 0.01, 0.01, False, Verdict.WORSE),  # as large as the tolerance is large enough
        (-0.05, 0.03, 0.06, False, Verdict.UNDECIDED),  # it may be chance
        (-0.01, 0.005, 0.01, False, Verdict.SAME),  # not chance, but smaller than matters
        (-0.01, 0.015, 0.5, False, Verdict.UNDECIDED),
        (0.0, 0.5, 1.0, False, Verdict.UNDECIDED),  # no change seen in too few samples
        (0.0, 0.5, 1.0, True, Verdict.SAME),  # the very same answers
    ],
)
def test_verdicts(change, half, p, alike, verdict):
    assert judge(change, half, p, 0.02, alike=alike) is verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1, 1, "same"), (1.01, 1.01, "worse"), (0.98, 0.99, "better"), (0.995, 1.005, "same"), (1, 1.2, "undecided")],
)
def test_verdicts_on_sizes(low, high, verdict):
    assert judge_range(low, high, 0.01) == verdict


def test_unchanged_scores_are_the_same_only_where_enough_samples_say_so():
    """Some answers read differently, none scores differently: with 10 samples anything may hide, with 200 not 2 %."""
    few, many = decide([Paired([[0.0] * 10]), Paired([[0.0] * 200])], [False, False], 0.02)
    assert few.verdict is Verdict.UNDECIDED
    assert few.more_needed > 100
    assert many.verdict is Verdict.SAME


def test_so_many_samples_as_are_said_to_be_needed_find_the_drop():
    """The promise of `more_needed`: 80 % power at the tolerance, held by simulation."""
    tolerance, churn = 0.1, 0.15
    deviation = np.sqrt(2 * churn + tolerance - tolerance**2)
    samples = samples_needed(deviation, tolerance, tests=1)
    rng = np.random.default_rng(0)
    turned = rng.choice([-1.0, 0.0, 1.0], (400, samples), p=[churn + tolerance, 1 - 2 * churn - tolerance, churn])
    # Half of all estimates fall short of a tolerance that equals the truth, so the test alone is what has the power.
    found = np.mean([Paired([list(row)]).p_value() <= 0.05 for row in turned])
    assert 0.72 < found < 0.9


@pytest.mark.parametrize("case", ALIKE)
def test_a_regression_that_is_not_there_does_not_fail_a_build(case):
    """1,000 pairs of alike runs: false verdicts in at most 5 % of them, whatever the number of cells."""
    assert share(ALIKE[case](1000), FALSE) <= nominal(1000)


@pytest.mark.slow
def test_nor_does_one_of_graded_scores():
    assert share(GRADED["scores in quarters, redrawn, 50 samples"](1000), FALSE) <= nominal(1000)


def test_the_documented_false_alarms_are_what_the_command_prints():
    documented = DOCS.read_text()
    for line in false_alarms(1000, {name: ALIKE[name] for name in list(ALIKE)[2:4]}):
        assert line in documented


def test_a_large_drop_is_found_and_a_small_sample_does_not_invent_one():
    assert share(comparisons(dropped(0.2), 200, 100, 1), FALSE[1:]) > 0.95
    assert share(comparisons(dropped(0.02), 50, 100, 1), FALSE[1:]) < 0.2


def test_speeds_that_spread_little_show_a_slowdown():
    assert share(sweeps(0.9, 0.01, 100), FALSE[1:]) > 0.95


def test_speeds_of_one_repeat_are_undecided():
    (decision,) = decide_speeds([Speed([100.0], [50.0])], 0.05)
    assert decision.verdict is Verdict.UNDECIDED
    assert "one repeat" in decision.why


def test_constant_speeds_are_judged_by_their_ratio():
    slower, alike = decide_speeds([Speed([100.0] * 3, [90.0] * 3), Speed([100.0] * 3, [100.0] * 3)], 0.05)
    assert slower.verdict is Verdict.WORSE
    assert alike.verdict is Verdict.SAME
