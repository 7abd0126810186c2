"""`skv eval longbench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.shared.options import Settings, with_options

if TYPE_CHECKING:
    from cli.shared.asked import AskedModel
    from evals.runs.task import Task

EPILOG = (
    "Examples:\n\n"
    "skv eval longbench\n\n"
    "skv eval longbench --model llama3.1-8b\n\n"
    "skv eval longbench --model smollm2-135m --data data.zip --tasks hotpotqa,lcc --samples 10\n\n"
    "skv eval longbench --model llama3.1-8b --e -m full -m shadowkv -m quest\n\n"
    "skv eval longbench --model llama3-8b-1m --min-tokens 4096 -m full -m shadowkv:budget=256\n\n"
    "skv eval longbench --model llama3.1-8b --v2 --wording prompts/0shot.txt\n\n"
    "skv eval longbench --model llama3.1-8b --v2 --temperature 0.7 --top-p 0.95 --answers 4"
)
_BRIEF_ROWS = 1  # of each task, by default on a CPU, where a prompt takes half a minute


@with_options(Settings, "settings")
def longbench(
    settings: Settings,
    tasks: Annotated[str, typer.Option(help="all, or a list such as hotpotqa,gov_report,lcc.")] = "all",
    e: Annotated[bool, typer.Option("--e", help="LongBench-E: 13 tasks, scores by length class.")] = False,
    v2: Annotated[bool, typer.Option("--v2", help="LongBench v2: 503 questions with four choices.")] = False,
    samples: Annotated[
        int | None, typer.Option(help="At most this many rows per task, the first ones (all; 1 of the Hub's on a CPU).")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder of <task>.jsonl files or data.zip (v2: data.json); the Hub's by default."),
    ] = None,
    wording: Annotated[
        str | None, typer.Option(help="official (skv pull longbench), own, or a file of templates (v2: own or a file).")
    ] = None,
    min_tokens: Annotated[
        int, typer.Option(help="Leave out rows whose prompt is not longer than this (ShadowKV's paper: 4096).")
    ] = 0,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longer prompts lose their middle (7500 at a context of 8k, 31500 at 32k).")
    ] = None,
) -> int:
    """LongBench, LongBench-E and LongBench v2: real documents, scored as their authors do.

    With nothing given, a CPU answers the first of the Hub's rows of each task, a GPU all of them. Each prompt is
    computed once and answered by every method. Interrupt at will: the same command continues.
    """
    from cli.eval import accuracy

    def task(asked: AskedModel) -> Task:
        from evals.common.names import choose_tasks
        from evals.longbench.task import LongBench
        from evals.longbench.tasks import E_TASKS, TASKS
        from evals.longbench.truncation import checked_limit
        from evals.longbench.v2 import LONGEST_PROMPT_TOKENS, LongBenchV2
        from shadowkv.common.errors import SkvError

        brief = samples is None and data is None and asked.device == "cpu"
        rows = _BRIEF_ROWS if brief else samples
        if v2:
            if e or tasks != "all" or min_tokens:
                raise SkvError("--e, --tasks and --min-tokens do nothing with --v2, which is one task")
            limit = checked_limit(max_prompt_tokens, asked.context_tokens, LONGEST_PROMPT_TOKENS)
            return LongBenchV2(
                limit, rows, data, wording or "own", thinking=settings.thinking, offline=settings.offline
            )
        return LongBench(
            tasks=choose_tasks(tasks, TASKS, E_TASKS if e else tuple(TASKS)),
            max_prompt_tokens=checked_limit(max_prompt_tokens, asked.context_tokens),
            all_tasks=tasks == "all",
            e=e,
            samples=rows,
            data=data,
            wording=wording or "official",
            min_tokens=min_tokens,
            thinking=settings.thinking,
            offline=settings.offline,
        )

    return accuracy.run(task, settings)
