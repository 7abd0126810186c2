"""Options that both benchmarks of speed have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class BenchSettings:
    """What both can be told."""

    model: Annotated[str, typer.Option(help="Preset (skv models), folder, Hub id or .gguf file.")]
    context: Annotated[str, typer.Option(help="Prompt lengths in tokens, k = 1024; decoded tokens come on top.")] = (
        "1k,2k,4k"
    )
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help="Method such as shadowkv:rank=64,budget=256, or all, or a set; repeatable."
        ),
    ] = None
    budget: Annotated[str | None, typer.Option(help="Tokens that every method attends to in all.")] = None
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
        str, typer.Option(help="Text of the prompts: auto (essays if pulled), essays, synthetic or a file.")
    ] = "auto"
    memory_cap: Annotated[
        str | None, typer.Option(help="Limit of device memory, such as 80GB or 24GiB (on a CPU: of what is planned).")
    ] = None
    seed: Annotated[int, typer.Option(help="Which stretches of text the prompts are.")] = 0
    out: Annotated[Path | None, typer.Option(help="Run folder; the same command continues it.")] = None
    force: Annotated[bool, typer.Option("--force", help="Continue a folder of another machine; tables say so.")] = False
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto (fp32 on a CPU, bf16 on a GPU), float32, bfloat16, float16.")] = (
        "auto"
    )
    dummy: Annotated[bool, typer.Option("--dummy", help="Random weights; every table says so.")] = False
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model's repo.")] = (
        False
    )
    prefill_chunk_tokens: Annotated[
        int | None, typer.Option("--prefill-chunk", help="Tokens per prefill chunk (256 on a CPU, 8192 on a GPU).")
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout and nothing else.")] = (
        False
    )
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be measured, and its memory.")] = False


def check(settings: BenchSettings) -> None:
    """Refuse what can be refused without looking at any model."""
    from cli.accuracy import DTYPES, check_writable
    from evals.bench.engines import ENGINES
    from evals.bench.vllm_engine import require_vllm
    from shadowkv.errors import SkvError
    from shadowkv.names import did_you_mean

    known = (*ENGINES, "vllm")
    for name in settings.engine or ():
        if name not in known:
            raise SkvError(f"unknown engine '{name}'{did_you_mean(name, known)}; one of {', '.join(known)}")
        if name == "vllm":
            require_vllm()
    least = {"--steps": (settings.steps, 1), "--warmup": (settings.warmup, 0)}
    least["--prefill-chunk"] = (1 if settings.prefill_chunk_tokens is None else settings.prefill_chunk_tokens, 1)
    for option, (value, minimum) in least.items():
        if value < minimum:
            raise SkvError(f"{option} must be at least {minimum}, got {value}")
    if settings.dtype not in DTYPES:
        known = DTYPES
        raise SkvError(
            f"unknown dtype '{settings.dtype}'{did_you_mean(settings.dtype, known)}; one of {', '.join(known)}"
        )
    if settings.out is not None:
        check_writable(settings.out)
