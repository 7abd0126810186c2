"""`skv eval niah`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.shared.options import Settings, with_options

if TYPE_CHECKING:
    from cli.shared.asked import AskedModel
    from evals.niah.task import Niah

EPILOG = (
    "Examples:\n\n"
    "skv eval niah\n\n"
    "skv eval niah --model smollm2-135m -m full -m shadowkv:rank=64,budget=256 -m quest:budget=256 --lengths 4k "
    "--depths 10\n\n"
    "skv eval niah --model llama3.1-8b --lengths 16k,64k,128k --depths 10 --rounds 3 --device cuda\n\n"
    "skv eval niah --model smollm2-135m -m @eviction --budget 512 --turns 5 --lengths 4k\n\n"
    "skv eval niah --model smollm2-135m -m full -m snapkv:budget=256 --lengths 2k --question both\n\n"
    "skv eval niah --model ./my-model --haystack book.txt --depths 0,50,100 --dry-run\n\n"
    "skv eval niah --model smollm2-135m --temperature 0.7 --answers 8"
)


@with_options(Settings, "settings")
def niah(
    settings: Settings,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens; k = 1024.")] = "1k,2k,4k",
    depths: Annotated[str, typer.Option(help="How many depths, or a list of percentages: 5 or 0,25,100.")] = "5",
    haystack: Annotated[str, typer.Option(help="essays, synthetic, or a .txt, .json or .jsonl file.")] = "essays",
    protocol: Annotated[str, typer.Option(help="magic-number or kamradt.")] = "magic-number",
    rounds: Annotated[int, typer.Option(help="Different needles and haystack starts per cell.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of needles and haystack starts.")] = 0,
    samples: Annotated[int | None, typer.Option(help="At most this many prompts, the first ones of the grid.")] = None,
    turns: Annotated[int, typer.Option(help="Needles per text, asked for one after the other in the same cache.")] = 1,
    first_query_in_prefill: Annotated[
        bool, typer.Option("--first-query-in-prefill", help="With --turns: the prompt contains the first question.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 16,
) -> int:
    """Needle in a haystack: does a method still find one fact at any depth of a long text?

    Each prompt is computed once and answered by every method. Scores are 1 if the answer contains the needle's
    number, else 0. Interrupt at will: the same command continues.
    """
    from functools import partial

    from cli.eval import accuracy
    from evals.common.lengths import parse_lengths
    from evals.niah.task import Niah, parse_depths
    from evals.niah.turns import MultiTurnNiah
    from shadowkv.common.errors import SkvError

    if first_query_in_prefill and settings.question is not None:
        raise SkvError("--first-query-in-prefill and --question both say where the first question stands; give one")

    def task(asked: AskedModel) -> Niah:
        # By itself, a conversation asks after the text; what --question moves is a question in the prompt.
        in_prefill = first_query_in_prefill or settings.question is not None
        several = partial(MultiTurnNiah, turns=turns, first_query_in_prefill=in_prefill)
        make = Niah if turns == 1 and not first_query_in_prefill else several
        return make(
            lengths=parse_lengths(lengths, None if settings.dry_run else asked.context_tokens),
            depths=parse_depths(depths),
            haystack_spec=haystack,
            protocol=protocol,
            rounds=rounds,
            seed=seed,
            samples=samples,
            max_new_tokens=max_new_tokens,
            thinking=settings.thinking,
        )

    return accuracy.run(task, settings)
