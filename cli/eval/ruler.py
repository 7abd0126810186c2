"""`skv eval ruler`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.shared.options import Settings, with_options

if TYPE_CHECKING:
    from cli.shared.asked import AskedModel
    from evals.ruler.task import Ruler
    from evals.runs.task import Task

EPILOG = (
    "Examples:\n\n"
    "skv eval ruler\n\n"
    "skv eval ruler --model smollm2-135m --lengths 2k --samples 5\n\n"
    "skv eval ruler --model llama3.1-8b --lengths 32k,128k --tasks niah_multikey_2,vt,qa_1 --samples 50\n\n"
    "skv eval ruler --model llama3-8b-1m --profile shadowkv --lengths 128k -m full -m shadowkv -m quest "
    "--device cuda\n\n"
    "skv eval ruler --model llama3.1-8b --lengths 128k --samples 2 --dry-run\n\n"
    "skv eval ruler --model smollm2-135m --lengths 1k --samples 5 --temperature 0.7 --top-p 0.95 --answers 4"
)


@dataclass(frozen=True)
class Prompts:
    """Which RULER prompts to make."""

    lengths: Annotated[
        str,
        typer.Option(
            help="Lengths in tokens, answer included; k = 1024. auto: 4k to 128k, as the model can take; 1k on a CPU."
        ),
    ] = "auto"
    tasks: Annotated[str, typer.Option(help="all (of the profile), or a list such as niah_single_1,vt,qa_2.")] = "all"
    samples: Annotated[
        int | None,
        typer.Option(help="Samples per task and length (nvidia 500, shadowkv 96; 2 on a CPU)."),
    ] = None
    profile: Annotated[
        str, typer.Option(help="nvidia: 13 tasks, string_match · shadowkv: its 11 tasks and metrics.")
    ] = "nvidia"
    wording: Annotated[str, typer.Option(help="official (skv pull ruler) or own, which needs no download.")] = (
        "official"
    )
    haystack: Annotated[str | None, typer.Option(help="Text in place of the essays: a .txt, .json or .jsonl file.")] = (
        None
    )
    seed: Annotated[int, typer.Option(help="Seed of all prompts.")] = 0

    def task_names(self) -> tuple[str, ...]:
        """The tasks asked for, in the benchmark's order."""
        from evals.common.names import choose_tasks
        from evals.ruler.tasks import TASKS, find_profile

        return choose_tasks(self.tasks, TASKS, find_profile(self.profile).tasks)

    def length_tokens(self, context_tokens: int, *, runnable: bool, brief: bool = False) -> tuple[int, ...]:
        """The lengths asked for; those of prompts that are only made may exceed the model's context.

        brief: by default, those that a CPU runs in minutes.
        """
        from evals.common.lengths import parse_lengths
        from evals.ruler.task import BRIEF_LENGTHS, DEFAULT_LENGTHS

        if self.lengths != "auto":
            return parse_lengths(self.lengths, context_tokens if runnable else None)
        known = BRIEF_LENGTHS if brief else DEFAULT_LENGTHS
        return tuple(length for length in known if length <= context_tokens) or (context_tokens,)

    def generated(self, context_tokens: int, *, runnable: bool, thinking: str, brief: bool = False) -> Ruler:
        """The benchmark that makes them. brief: see `length_tokens`."""
        from evals.ruler.task import BRIEF_SAMPLES, Ruler
        from evals.ruler.tasks import find_profile

        own = BRIEF_SAMPLES if brief else find_profile(self.profile).samples
        return Ruler(
            lengths=self.length_tokens(context_tokens, runnable=runnable, brief=brief),
            tasks=self.task_names(),
            samples=own if self.samples is None else self.samples,
            profile=self.profile,
            wording=self.wording,
            haystack_spec=self.haystack,
            seed=self.seed,
            thinking=thinking,
        )


@with_options(Settings, "settings")
@with_options(Prompts, "prompts")
def ruler(
    settings: Settings,
    prompts: Prompts,
    data: Annotated[Path | None, typer.Option(help="Folder of prompts in NVIDIA's schema (skv data ruler).")] = None,
    wrap_data: Annotated[bool, typer.Option("--wrap-data", help="Put --data into the chat template.")] = False,
) -> int:
    """RULER: thirteen synthetic tasks, from needles to variable tracking, counting and question answering.

    With nothing given, a CPU runs 2 samples per task at 1k tokens, in minutes; a GPU the benchmark itself: 500 samples
    at 4k, 8k, ... to 128k. Prompts fill their length, answer included, and are scored by NVIDIA's metrics. Each prompt
    is computed once and answered by every method. Interrupt at will: the same command continues.
    """
    from cli.eval import accuracy

    def task(asked: AskedModel) -> Task:
        from evals.ruler.files import RulerFiles
        from shadowkv.common.errors import SkvError

        runnable, context_tokens = not settings.dry_run, asked.context_tokens
        if data is None:
            if wrap_data:
                raise SkvError("--wrap-data does nothing without --data")
            brief = asked.device == "cpu"
            return prompts.generated(context_tokens, runnable=runnable, thinking=settings.thinking, brief=brief)
        if prompts.haystack is not None or prompts.seed or prompts.wording != "official":
            raise SkvError("--haystack, --seed and --wording do nothing with --data, whose prompts are ready")
        return RulerFiles(
            folder=data,
            lengths=() if prompts.lengths == "auto" else prompts.length_tokens(context_tokens, runnable=runnable),
            tasks=prompts.task_names(),
            samples=prompts.samples,
            profile=prompts.profile,
            wrap=wrap_data,
            all_tasks=prompts.tasks == "all",
            context_tokens=context_tokens if runnable else None,
            thinking=settings.thinking,
        )

    return accuracy.run(task, settings)
