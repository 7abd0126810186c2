"""`skv data ruler`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.eval_ruler import Haystack, Lengths, ProfileName, Samples, Seed, Tasks, Wording, made

EPILOG = (
    "Examples:\n\n"
    "skv data ruler --model smollm2-135m --lengths 4k --samples 100 --out prompts\n\n"
    "skv eval ruler --model smollm2-135m --data prompts"
)


def ruler(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder to write <length>/<task>/validation.jsonl into.")],
    lengths: Lengths = "auto",
    tasks: Tasks = "all",
    samples: Samples = None,
    profile: ProfileName = "nvidia",
    wording: Wording = "official",
    haystack: Haystack = None,
    seed: Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Write RULER's prompts, made to measure for a model's tokenizer, as JSONL in NVIDIA's schema."""
    from cli.accuracy import check_writable
    from cli.render import console, quieten_libraries, status
    from evals.ruler.files import write_files
    from shadowkv.loading import context_tokens, load_config, load_tokenizer
    from shadowkv.resolving import resolve

    quieten_libraries()
    check_writable(out)
    source = resolve(model, dummy=False)
    context = context_tokens(source, load_config(source, trust_remote_code=trust_remote_code))
    run = made(lengths, tasks, samples, profile, wording, haystack, seed, context, runnable=False)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    with status("making prompts", quiet=quiet) as update:
        paths = write_files(run, tokenizer, out, lambda done, total: update(f"{done}/{total}"))
    if not quiet:
        console().print(f"{out}: {len(paths)} files", markup=False, highlight=False, soft_wrap=True)
