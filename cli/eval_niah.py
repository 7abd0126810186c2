"""`skv eval niah`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from evals.niah.task import Niah

EPILOG = (
    "Examples:\n\n"
    "skv eval niah --model smollm2-135m\n\n"
    "skv eval niah --model smollm2-135m -m full -m shadowkv:rank=64,budget=256 -m quest:budget=256 --lengths 4k "
    "--depths 10\n\n"
    "skv eval niah --model llama3.1-8b --lengths 16k,64k,128k --depths 10 --rounds 3 --device cuda\n\n"
    "skv eval niah --model ./my-model --haystack book.txt --depths 0,50,100 --dry-run"
)


def niah(
    model: Annotated[str, typer.Option(help="Preset (skv models), folder, Hub id or .gguf file.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Method such as shadowkv:rank=64,budget=256; repeatable (skv methods)."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens; k = 1024.")] = "1k,2k,4k",
    depths: Annotated[str, typer.Option(help="How many depths, or a list of percentages: 5 or 0,25,100.")] = "5",
    haystack: Annotated[str, typer.Option(help="essays, synthetic, or a .txt, .json or .jsonl file.")] = "essays",
    protocol: Annotated[str, typer.Option(help="magic-number or kamradt.")] = "magic-number",
    rounds: Annotated[int, typer.Option(help="Different needles and haystack starts per cell.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of needles and haystack starts.")] = 0,
    samples: Annotated[int | None, typer.Option(help="At most this many prompts, the first ones of the grid.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Run folder; the same command continues it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (fp32 on a CPU, bf16 on a GPU), float32, bfloat16, float16.")
    ] = "auto",
    dummy: Annotated[bool, typer.Option("--dummy", help="Random weights; every table says so.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the model's repo.")
    ] = False,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Tokens per prefill chunk (256 on a CPU, 8192 on a GPU).")
    ] = None,
    prefix_reuse: Annotated[bool, typer.Option(help="Compute what prompts share once.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and run nothing.")] = False,
) -> int:
    """Needle in a haystack: does a method still find one fact at any depth of a long text?

    Each prompt is computed once and answered by every method. Scores are 1 if the answer contains the needle's
    number, else 0. Interrupt at will: the same command continues.
    """
    from cli import accuracy
    from evals.niah.task import Niah, parse_depths, parse_lengths

    def task(context_tokens: int) -> Niah:
        return Niah(
            lengths=parse_lengths(lengths, context_tokens),
            depths=parse_depths(depths),
            haystack_spec=haystack,
            protocol=protocol,
            rounds=rounds,
            seed=seed,
            samples=samples,
            max_new_tokens=max_new_tokens,
        )

    settings = accuracy.Settings(
        model=model,
        methods=tuple(method or ()),
        out=out,
        device=device,
        dtype=dtype,
        dummy=dummy,
        trust_remote_code=trust_remote_code,
        prefill_chunk_tokens=prefill_chunk,
        reuse_prefix=prefix_reuse,
        as_json=as_json,
        quiet=quiet,
    )
    return accuracy.plan(task, settings) if dry_run else accuracy.run(task, settings)
