"""Options of answers that are drawn instead of greedy, and what they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from evals.runs.wrapping.sampled import Sampling


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. What is not given is None, so that an option without effect can be refused."""

    temperature: Annotated[
        float | None,
        typer.Option(help="Draw answers at this temperature. 0, the default: greedy, always the most likely token."),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the fewest tokens whose probability reaches this; 1, the default, for all."),
    ] = None
    answers: Annotated[
        int | None,
        typer.Option(help="Answers drawn per prompt, from one prefill; tables average them first, and show pass@k."),
    ] = None
    sampling_seed: Annotated[
        int | None,
        typer.Option(
            help="Other random numbers for the same prompts, which --seed chooses where there is one (0). Numbers "
            "belong to a prompt and an answer: every method gets the same."
        ),
    ] = None


def sampling_of(options: SamplingOptions) -> Sampling | None:
    """What was asked for, None for greedy answers. Raises `SkvError` on what cannot be, or does nothing."""
    from evals.runs.wrapping.sampled import Sampling
    from shadowkv.common.errors import SkvError

    given = {"top-p": options.top_p, "answers": options.answers, "sampling-seed": options.sampling_seed}
    top_p = 1.0 if options.top_p is None else options.top_p
    answers = 1 if options.answers is None else options.answers
    # Impossible values are named as such first, whether or not they would do anything.
    asked = Sampling(options.temperature or 1.0, top_p, answers, options.sampling_seed or 0)
    without = [f"--{name} {value:g}" for name, value in given.items() if value is not None]
    if not options.temperature and without:
        raise SkvError(f"{without[0]} does nothing to greedy answers, which are all alike; add --temperature 0.7, say")
    return asked if options.temperature else None
