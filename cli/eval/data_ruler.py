"""`skv data ruler`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.eval.ruler import Prompts
from cli.shared.options import MODEL_HELP, with_options

EPILOG = (
    "Examples:\n\n"
    "skv data ruler --samples 5\n\n"
    "skv data ruler --model smollm2-135m --lengths 4k --samples 100 --out prompts\n\n"
    "skv eval ruler --model smollm2-135m --data prompts"
)


@with_options(Prompts, "prompts")
def ruler(
    prompts: Prompts,
    model: Annotated[str | None, typer.Option(help=f"Whose tokenizer measures. {MODEL_HELP}")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write <length>/<task>/validation.jsonl into (results/prompts/ruler-MODEL)."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the model's repo.")
    ] = False,
    thinking: Annotated[
        str,
        typer.Option(help="Thoughts before an answer: on, off, or auto (off where the template has a switch)."),
    ] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing, as with SKV_OFFLINE=1.")] = False,
) -> int:
    """Write RULER's prompts, made to measure for a model's tokenizer, as JSONL in NVIDIA's schema."""
    from cli.eval.accuracy import tell_left_out, tell_notes
    from cli.shared.checks import check_writable
    from cli.shared.fetching import fetch_missing, fetch_weights, telling
    from cli.shared.render import console, status
    from cli.shared.which_model import best_model
    from evals.common.chat import Chat
    from evals.ruler.files import write_files
    from shadowkv.models.loading import context_tokens, load_config, load_tokenizer
    from shadowkv.models.resolving import resolve

    if out is not None:
        check_writable(out)
    name = best_model(silent=quiet) if model is None else model
    fetch_weights(name, offline=offline, silent=quiet)
    with telling(silent=quiet) as on_download:
        source = resolve(name, offline=offline, on_download=on_download)
    folder = out or Path("results") / "prompts" / f"ruler-{source.name.replace('/', '--')}"
    context = context_tokens(source, load_config(source, trust_remote_code=trust_remote_code))
    run = prompts.generated(context, runnable=False, thinking=thinking)
    fetch_missing(run.needs(), offline=offline, silent=quiet)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    notes = Chat(tokenizer, thinking).notes(run.chat_answer_tokens())
    left_out = run.left_out(tokenizer)
    tell_left_out(left_out)
    if not quiet:
        tell_notes(notes)
    with status("making prompts", quiet=quiet) as update:
        paths = write_files(run, tokenizer, folder, lambda done, total: update(f"{done}/{total}"))
    if not quiet:
        console().print(f"{folder}: {len(paths)} files", markup=False, highlight=False, soft_wrap=True)
    return 1 if left_out else 0
