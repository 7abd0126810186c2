"""`skv data ruler`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.eval_ruler import Prompts
from cli.options import with_options

EPILOG = (
    "Examples:\n\n"
    "skv data ruler --model smollm2-135m --lengths 4k --samples 100 --out prompts\n\n"
    "skv eval ruler --model smollm2-135m --data prompts"
)


@with_options(Prompts, "prompts")
def ruler(
    prompts: Prompts,
    model: Annotated[str, typer.Option(help="Preset (skv models), folder or Hub id, whose tokenizer measures.")],
    out: Annotated[Path, typer.Option(help="Folder to write <length>/<task>/validation.jsonl into.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the model's repo.")
    ] = False,
    thinking: Annotated[
        str,
        typer.Option(help="Thoughts before an answer: on, off, or auto (off where the template has a switch)."),
    ] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> int:
    """Write RULER's prompts, made to measure for a model's tokenizer, as JSONL in NVIDIA's schema."""
    from cli.accuracy import tell_left_out, tell_notes
    from cli.checks import check_writable
    from cli.render import console, quieten_libraries, status
    from evals.chat import Chat
    from evals.ruler.files import write_files
    from shadowkv.loading import context_tokens, load_config, load_tokenizer
    from shadowkv.resolving import resolve

    quieten_libraries()
    check_writable(out)
    source = resolve(model, dummy=False)
    context = context_tokens(source, load_config(source, trust_remote_code=trust_remote_code))
    run = prompts.generated(context, runnable=False, thinking=thinking)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    notes = Chat(tokenizer, thinking).notes(run.chat_answer_tokens())
    left_out = run.left_out(tokenizer)
    tell_left_out(left_out)
    if not quiet:
        tell_notes(notes)
    with status("making prompts", quiet=quiet) as update:
        paths = write_files(run, tokenizer, out, lambda done, total: update(f"{done}/{total}"))
    if not quiet:
        console().print(f"{out}: {len(paths)} files", markup=False, highlight=False, soft_wrap=True)
    return 1 if left_out else 0
