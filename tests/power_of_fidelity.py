"""How small a loss `skv eval fidelity` finds: `python tests/power_of_fidelity.py` prints the table; takes a while.

Losses that are known are planted into ShadowKV on a real model, and what judges real runs judges them, on samples of
prompts drawn from those that were measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from evals.compare.fidelity import Divergences, decide_divergences
from evals.compare.verdicts import ALPHA, Verdict
from evals.fidelity.task import RunningText
from evals.runs.forced.forcing import Forcing
from evals.runs.forced.loop import forced_answers
from evals.runs.forced.record import ForcedRecord
from evals.runs.run import Run
from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.methods.shadowkv import landmarks
from shadowkv.methods.shadowkv.landmarks import Landmarks
from shadowkv.models.named import load
from shadowkv.tensors import ops

MODEL = "smollm2-135m"
LENGTHS, FORCED, PROMPTS = (1024,), 64, 64
BASE = "shadowkv:rank=64,budget=256"
TOLERANCE, DRAWS = 0.01, 400


@contextmanager
def one_wrong_outlier() -> Iterator[None]:
    """Of the chunks kept exact, the last is the one that needs it least."""

    def of(keys: Tensor, chunk: int, outliers: int) -> tuple[Landmarks, Tensor]:
        chunks = keys.shape[2] // chunk
        means, likeness = landmarks._summarised(keys.unflatten(2, (chunks, chunk)))
        worst = torch.cat((ops.top_indices(-likeness, outliers - 1), ops.top_indices(likeness, 1)), dim=-1)
        regular = landmarks._complement(worst, chunks)
        kept = Landmarks(ops.gather_tokens(means, regular), regular.int(), chunk)
        return kept, ops.token_indices(worst.sort(dim=-1).values, chunk)

    with patch.object(Landmarks, "of", staticmethod(of)):
        yield


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


PLANTED: dict[str, tuple[str, Callable[[], AbstractContextManager[None]]]] = {
    "": (BASE, as_it_is),
    "rank 64 → 60": ("shadowkv:rank=60,budget=256", as_it_is),
    "rank 64 → 62": ("shadowkv:rank=62,budget=256", as_it_is),
    "budget 256 → 248": ("shadowkv:rank=64,budget=248", as_it_is),
    "budget 256 → 240": ("shadowkv:rank=64,budget=240", as_it_is),
    "one wrong outlier": (BASE, one_wrong_outlier),
    "values in int8": ("shadowkv:rank=64,budget=256,values=int8", as_it_is),
    "values in int4": ("shadowkv:rank=64,budget=256,values=int4", as_it_is),
}


def measured() -> dict[tuple[str, int], list[ForcedRecord]]:
    """By loss and length; the empty loss is none."""
    loaded = load(MODEL)
    run = Run(Engine(loaded.model), loaded, SimpleNamespace(benchmark="fidelity"))  # type: ignore[arg-type]
    task = RunningText(LENGTHS, FORCED, PROMPTS)
    found: dict[tuple[str, int], list[ForcedRecord]] = {}
    began = time.perf_counter()
    for example in task.examples(loaded.tokenizer):
        for planted in (as_it_is, one_wrong_outlier):
            specs = {name: spec for name, (spec, how) in PLANTED.items() if how is planted}
            with planted():
                records = list(forced_answers(run, Forcing(FORCED), example, list(map(parse_method, specs.values()))))
            for name, record in zip(specs, records, strict=True):
                assert record.final, record.error
                found.setdefault((name, example.length_tokens), []).append(record)
        said = f"{len(found['', example.length_tokens])} prompts of {example.length_tokens}"
        sys.stderr.write(f"{said}, {time.perf_counter() - began:.0f} s\n")
    return found


def power(before: Sequence[ForcedRecord], after: Sequence[ForcedRecord], prompts: int) -> float:
    """Share of samples of so many prompts in which the loss is judged worse, among three cells."""
    rng, worse = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        drawn = rng.choice(len(before), size=prompts, replace=True)
        cell = Divergences([(before[i], after[i]) for i in drawn])
        same = Divergences([(before[i], before[i]) for i in drawn])
        worse += decide_divergences([same, cell, same], TOLERANCE)[1].verdict is Verdict.WORSE
    return worse / DRAWS


def least_found(before: Sequence[ForcedRecord], after: Sequence[ForcedRecord]) -> float:
    """The change found with 90 % power by all prompts, if it spreads as this one: three tests, normal approximation."""
    from scipy.stats import norm

    changes = Divergences(list(zip(before, after, strict=True))).changes
    error = float(np.std(changes.groups[0], ddof=1)) / len(before) ** 0.5
    return float(norm.ppf(1 - ALPHA / 6) + norm.ppf(0.9)) * error


def main() -> None:
    """Print the table."""
    found = measured()
    counts = (6, 8, 12, 16, 32, 64)
    shown = sys.stdout.write
    shown(f"| planted | length | KL | change | {' | '.join(f'{n} prompts' for n in counts)} | found |\n")
    shown("|---|---|---:|---:|" + "---:|" * (len(counts) + 1) + "\n")
    for length in LENGTHS:
        before = found["", length]
        for name in list(PLANTED)[1:]:
            after = found[name, length]
            cell = Divergences(list(zip(before, after, strict=True)))
            shares = [f"{power(before, after, n):.0%}" for n in counts]
            least = least_found(before, after)
            kl = f"{cell.mean(1, lambda r: r.mean_kl):.4f}"
            shown(
                f"| {name} | {length} | {kl} | {cell.changes.difference:+.1%} | {' | '.join(shares)} | {least:.1%} |\n"
            )


if __name__ == "__main__":
    main()
