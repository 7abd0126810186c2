"""Options that both benchmarks of speed have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from cli.shared.options import RunOptions


@dataclass(frozen=True)
class BenchSettings(RunOptions):
    """What both can be told beside what every run can."""

    context: Annotated[
        str,
        typer.Option(
            help="Prompt lengths in tokens, k = 1024; decoded tokens come on top. auto: 1k,2k on a CPU, else 1k,2k,4k."
        ),
    ] = "auto"
    engine: Annotated[
        list[str] | None,
        typer.Option(help="Also measure full attention as another engine runs it: hf, or vllm; repeatable."),
    ] = None
    steps: Annotated[int, typer.Option(help="Decode steps that are measured.")] = 32
    warmup: Annotated[int, typer.Option(help="Decode steps before those, which do not count.")] = 4
    synthetic_kv: Annotated[
        bool, typer.Option("--synthetic-kv", help="Random keys and values, no prefill; every table says so.")
    ] = False
    haystack: Annotated[
        str, typer.Option(help="Text of the prompts: auto (essays, synthetic if offline), essays, synthetic or a file.")
    ] = "auto"
    memory_cap: Annotated[
        str | None, typer.Option(help="Limit of device memory, such as 80GB or 24GiB (on a CPU: of what is planned).")
    ] = None
    seed: Annotated[int, typer.Option(help="Which stretches of text the prompts are.")] = 0
    force: Annotated[bool, typer.Option("--force", help="Continue a folder of another machine; tables say so.")] = False


def default_contexts(device: str, context_tokens: int) -> str:
    """`--context auto`: few and short ones where a prompt takes seconds."""
    from shadowkv.common.errors import SkvError

    asked = (1024, 2048) if device == "cpu" else (1024, 2048, 4096)
    fitting = [str(tokens) for tokens in asked if tokens < context_tokens]
    if not fitting:
        raise SkvError(f"this model's context of {context_tokens} tokens is too short for --context auto; give one")
    return ",".join(fitting)


def check(settings: BenchSettings) -> None:
    """Refuse what can be refused without looking at any model."""
    from cli.shared.checks import check_run
    from evals.bench.engines import ENGINES
    from evals.bench.vllm_engine import require_vllm
    from shadowkv.common.errors import SkvError
    from shadowkv.common.names import did_you_mean

    known = (*ENGINES, "vllm")
    for name in settings.engine or ():
        if name not in known:
            raise SkvError(f"unknown engine '{name}'{did_you_mean(name, known)}; one of {', '.join(known)}")
        if name == "vllm":
            own = {
                "--dummy": settings.dummy,
                "--synthetic-kv": settings.synthetic_kv,
                "--memory-cap": settings.memory_cap,
                "--adapter": settings.adapter,
                "--allow-unexpected-weights": settings.allow_unexpected_weights,
            }
            for option in [option for option, given in own.items() if given]:
                raise SkvError(f"--engine vllm has weights, prompts and memory of its own, so {option} is not of it")
            require_vllm()
    least = {"--steps": (settings.steps, 1), "--warmup": (settings.warmup, 0)}
    for option, (value, minimum) in least.items():
        if value < minimum:
            raise SkvError(f"{option} must be at least {minimum}, got {value}")
    check_run(settings)
