"""`skv eval fidelity`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from cli.shared.options import Settings, with_options

if TYPE_CHECKING:
    from cli.shared.asked import AskedModel
    from evals.fidelity.task import RunningText

_FORCED_TOKENS = 64
EPILOG = (
    "Examples:\n\n"
    "skv eval fidelity\n\n"
    "skv eval fidelity --model smollm2-135m -m all --budget 256,512 --lengths 2k,4k\n\n"
    "skv eval fidelity --model llama3.1-8b --data books/ --lengths 32k,128k --forced 256 --device cuda\n\n"
    "skv eval fidelity --continuation greedy --samples 16 -m full -m shadowkv:rank=64,budget=256\n\n"
    "The same on other prompts:  skv eval niah --forced 64"
)


@with_options(Settings, "settings")
def fidelity(
    settings: Settings,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens; k = 1024.")] = "2k",
    samples: Annotated[int, typer.Option(help="Prompts per length.")] = 8,
    data: Annotated[
        str, typer.Option(help="Texts: essays, synthetic, a .txt, .json or .jsonl file, or a folder of books.")
    ] = "essays",
    seed: Annotated[int, typer.Option(help="Seed of where prompts begin.")] = 0,
) -> int:
    """How far is a method from full attention after every single token of a text?

    Every method is fed the same tokens (64; see --forced), and the distribution after each is held to full
    attention's: KL divergence, agreement, perplexity. A small loss shows in minutes. Interrupt at will: the same
    command continues.
    """
    from cli.eval import accuracy
    from evals.common.lengths import parse_lengths
    from evals.fidelity.task import RunningText
    from shadowkv.common.errors import SkvError

    if settings.question is not None:
        raise SkvError("--question: nothing is asked about a running text; 'skv eval niah --forced 64' has questions")
    forced_tokens = _FORCED_TOKENS if settings.forced is None else settings.forced

    def task(asked: AskedModel) -> RunningText:
        wanted, room = parse_lengths(lengths, None), asked.context_tokens
        if max(wanted) + forced_tokens > room and not settings.dry_run:
            raise SkvError(
                f"{max(wanted)} tokens and {forced_tokens} forced ones are beyond this model's context of {room} tokens"
            )
        return RunningText(
            lengths=wanted,
            forced_tokens=forced_tokens,
            samples=samples,
            data=data,
            seed=seed,
        )

    return accuracy.run(task, replace(settings, forced=forced_tokens))
