"""How often `skv compare` cries wolf, and how often it sees one: `python tests/simulate_compare.py` prints both tables.

Runs are made up: answers, and speeds, drawn from distributions that are known to be alike or not. What judges them is
what judges real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from evals.compare.gate import TOLERANCES
from evals.compare.paired import Paired
from evals.compare.speed import Speed, decide_speeds
from evals.compare.verdicts import Decision, Verdict, decide

METHODS, TASKS = 3, 2
RIGHT = 0.8  # of the baseline's answers
CHURN = 0.02  # of all answers turn right, and as many wrong, by chance
Make = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def redrawn(rng: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong, the second run knowing nothing of the first: the most that two alike runs can differ."""
    before, after = rng.random((2, samples)) < RIGHT
    return before.astype(float), after.astype(float)


def churned(rng: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The same answers, but for a few that turn: another CPU."""
    return dropped(0.0)(rng, samples)


def graded(rng: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in quarters, as RULER's of four needles are."""
    before, after = rng.binomial(4, RIGHT, (2, samples)) / 4
    return before, after


def dropped(drop: float) -> Make:
    """Of all answers, `drop` are lost for good, beside those that turn by chance."""

    def make(rng: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
        before = rng.random(samples) < RIGHT
        lost = rng.random(samples) < (drop + CHURN) / RIGHT
        won = rng.random(samples) < CHURN / (1 - RIGHT)
        return before.astype(float), np.where(before, ~lost, won).astype(float)

    return make


def comparisons(
    make: Make, samples: int, runs: int, methods: int = METHODS, tasks: int = TASKS, others: Make | None = None
) -> Iterator[list[Decision]]:
    """Comparisons of `methods` x `tasks` cells and the methods' means; methods but the first made by `others`."""
    for seed in range(runs):
        rng = np.random.default_rng([seed, samples])
        found = []
        for method in range(methods):
            drawn = [(others if method and others else make)(rng, samples) for _ in range(tasks)]
            cells = [after - before for before, after in drawn]
            found += [Paired(cells)] if tasks > 1 else []
            found += [Paired([cell]) for cell in cells]
        yield decide(found, [not paired.wins + paired.losses for paired in found], TOLERANCES["accuracy"])


def sweeps(ratio: float, spread: float, runs: int, repeats: int = 5) -> Iterator[list[Decision]]:
    """Sweeps of METHODS x TASKS cells, log-normal repeats."""
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        drawn = rng.lognormal(0, spread, (METHODS * TASKS, 2, repeats))
        speeds = [Speed(list(before), list(ratio * after)) for before, after in drawn]
        yield decide_speeds(speeds, TOLERANCES["throughput"])


def share(runs: Iterable[list[Decision]], verdicts: Sequence[Verdict]) -> float:
    """Of comparisons that hold any of these verdicts."""
    return float(np.mean([any(d.verdict in verdicts for d in decisions) for decisions in runs]))


FALSE = (Verdict.BETTER, Verdict.WORSE)
ALIKE: dict[str, Callable[[int], Iterator[list[Decision]]]] = {
    "right or wrong, redrawn, 100 samples": lambda runs: comparisons(redrawn, 100, runs),
    "right or wrong, redrawn, 400 samples": lambda runs: comparisons(redrawn, 400, runs),
    "4 % of the answers turn, 200 samples": lambda runs: comparisons(churned, 200, runs),
    "speeds, repeats spread by 3 %": lambda runs: sweeps(1.0, 0.03, runs),
    "speeds, repeats spread by 10 %": lambda runs: sweeps(1.0, 0.10, runs),
}
GRADED = {"scores in quarters, redrawn, 50 samples": lambda runs: comparisons(graded, 50, runs)}  # minutes
DROPS, SAMPLES = (0.02, 0.05, 0.10, 0.20), (50, 100, 200, 500)


def false_alarms(runs: int, cases: dict[str, Callable[[int], Iterator[list[Decision]]]] = ALIKE) -> list[str]:
    """Table lines: comparisons of alike runs that hold a false verdict, and those that would fail a build."""
    made = {name: list(make(runs)) for name, make in cases.items()}
    return [
        f"| {name} | {100 * share(found, FALSE):.1f} % | {100 * share(found, FALSE[1:]):.1f} % |"
        for name, found in made.items()
    ]


def power(runs: int) -> list[str]:
    """Table lines: comparisons that fail a build when every cell of one method really drops."""
    return [
        f"| {samples} | "
        + " | ".join(f"{100 * share(comparisons(dropped(drop), samples, runs, 1), FALSE[1:]):.0f} %" for drop in DROPS)
        + " |"
        for samples in SAMPLES
    ]


def set_power(runs: int) -> list[str]:
    """Table lines: comparisons in which the regression set finds one of three methods broken by so much."""
    return [
        f"| {name} | "
        + " | ".join(
            f"{100 * share(comparisons(dropped(drop), samples, runs, 3, tasks, churned), FALSE[1:]):.0f} %"
            for drop in (0.1, 0.2, 0.3, 0.4)
        )
        + " |"
        for name, tasks, samples in (("NIAH, 30 prompts", 1, 30), ("RULER, 4 x 12 prompts", 4, 12))
    ]


def speed_power(runs: int) -> list[str]:
    """Table lines: sweeps that fail a build when everything really is slower."""
    return [
        f"| {100 * spread:.0f} % | "
        + " | ".join(f"{100 * share(sweeps(1 - drop, spread, runs), FALSE[1:]):.0f} %" for drop in (0.05, 0.1, 0.2))
        + " |"
        for spread in (0.01, 0.03, 0.10)
    ]


def main() -> None:
    """Print everything, as docs/compare.md has it."""
    lines = [
        *false_alarms(1000),
        *false_alarms(1000, GRADED),
        "",
        *power(500),
        "",
        *speed_power(500),
        "",
        *set_power(500),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
