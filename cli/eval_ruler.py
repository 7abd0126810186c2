"""`skv eval ruler`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options

if TYPE_CHECKING:
    from evals.ruler.task import Ruler
    from evals.task import Task

EPILOG = (
    "Examples:\n\n"
    "skv eval ruler --model smollm2-135m --lengths 2k --samples 5\n\n"
    "skv eval ruler --model llama3.1-8b --lengths 32k,128k --tasks niah_multikey_2,vt,qa_1 --samples 50\n\n"
    "skv eval ruler --model llama3-8b-1m --profile shadowkv --lengths 128k -m full -m shadowkv -m quest "
    "--device cuda\n\n"
    "skv eval ruler --model llama3.1-8b --lengths 128k --samples 2 --dry-run"
)

Lengths = Annotated[
    str, typer.Option(help="Lengths in tokens, answer included; k = 1024. auto: 4k to 128k, as the model can take.")
]
Tasks = Annotated[str, typer.Option(help="all (of the profile), or a list such as niah_single_1,vt,qa_2.")]
Samples = Annotated[int | None, typer.Option(help="Samples per task and length (nvidia 500, shadowkv 96).")]
ProfileName = Annotated[str, typer.Option(help="nvidia: 13 tasks, string_match · shadowkv: its 11 tasks and metrics.")]
Wording = Annotated[str, typer.Option(help="official (skv pull ruler) or own, which needs no download.")]
Haystack = Annotated[str | None, typer.Option(help="Text in place of the essays: a .txt, .json or .jsonl file.")]
Seed = Annotated[int, typer.Option(help="Seed of all prompts.")]


def ruler(
    model: options.Model,
    method: options.Methods = None,
    budget: options.Budget = None,
    lengths: Lengths = "auto",
    tasks: Tasks = "all",
    samples: Samples = None,
    profile: ProfileName = "nvidia",
    wording: Wording = "official",
    haystack: Haystack = None,
    seed: Seed = 0,
    data: Annotated[Path | None, typer.Option(help="Folder of prompts in NVIDIA's schema (skv data ruler).")] = None,
    wrap_data: Annotated[bool, typer.Option("--wrap-data", help="Put --data into the chat template.")] = False,
    out: options.Out = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    dummy: options.Dummy = False,
    trust_remote_code: options.TrustRemoteCode = False,
    prefill_chunk: options.PrefillChunk = None,
    prefix_reuse: options.PrefixReuse = True,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    diagnostics: options.Diagnostics = False,
) -> int:
    """RULER: thirteen synthetic tasks, from needles to variable tracking, counting and question answering.

    Prompts fill their length, answer included, and are scored by NVIDIA's metrics. Each prompt is computed once and
    answered by every method. Interrupt at will: the same command continues.
    """
    from cli import accuracy

    def task(context_tokens: int) -> Task:
        from evals.names import choose_tasks
        from evals.ruler.files import RulerFiles
        from evals.ruler.tasks import TASKS, find_profile
        from shadowkv.errors import SkvError

        if wrap_data and data is None:
            raise SkvError("--wrap-data does nothing without --data")
        if data is not None:
            if haystack is not None or seed or wording != "official":
                raise SkvError("--haystack, --seed and --wording do nothing with --data, whose prompts are ready")
            chosen = () if lengths == "auto" else _lengths(lengths, context_tokens, runnable=not dry_run)
            names = choose_tasks(tasks, TASKS, find_profile(profile).tasks)
            return RulerFiles(
                data,
                chosen,
                names,
                samples,
                profile,
                wrap_data,
                all_tasks=tasks == "all",
                context_tokens=None if dry_run else context_tokens,
            )
        return made(lengths, tasks, samples, profile, wording, haystack, seed, context_tokens, runnable=not dry_run)

    settings = accuracy.Settings(
        model=model,
        methods=tuple(method or ()),
        budget=budget,
        out=out,
        device=device,
        dtype=dtype,
        dummy=dummy,
        trust_remote_code=trust_remote_code,
        prefill_chunk_tokens=prefill_chunk,
        reuse_prefix=prefix_reuse,
        as_json=as_json,
        quiet=quiet,
        dry_run=dry_run,
        diagnostics=diagnostics,
    )
    return accuracy.run(task, settings)


def made(
    lengths: str,
    tasks: str,
    samples: int | None,
    profile: str,
    wording: str,
    haystack: str | None,
    seed: int,
    context_tokens: int,
    *,
    runnable: bool,
) -> Ruler:
    """The benchmark that the options describe; prompts that are only made may exceed the model's context."""
    from evals.names import choose_tasks
    from evals.ruler.task import Ruler
    from evals.ruler.tasks import TASKS, find_profile

    found = find_profile(profile)
    return Ruler(
        lengths=_lengths(lengths, context_tokens, runnable=runnable),
        tasks=choose_tasks(tasks, TASKS, found.tasks),
        samples=found.samples if samples is None else samples,
        profile=profile,
        wording=wording,
        haystack_spec=haystack,
        seed=seed,
    )


def _lengths(text: str, context_tokens: int, *, runnable: bool) -> tuple[int, ...]:
    from evals.lengths import parse_lengths
    from evals.ruler.task import DEFAULT_LENGTHS

    if text != "auto":
        return parse_lengths(text, context_tokens if runnable else None)
    return tuple(length for length in DEFAULT_LENGTHS if length <= context_tokens) or (context_tokens,)
