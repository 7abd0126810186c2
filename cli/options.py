"""Options that every accuracy benchmark has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Preset (skv models), folder, Hub id or .gguf file.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-m",
        help="Method such as shadowkv:rank=64,budget=256, or all, or a set such as @paper; repeatable.",
    ),
]
Budget = Annotated[
    str | None, typer.Option(help="Tokens that every method attends to in all, so that they compare: 512 or 256,512.")
]
Out = Annotated[Path | None, typer.Option(help="Run folder; the same command continues it.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (fp32 on a CPU, bf16 on a GPU), float32, bfloat16, float16.")]
Dummy = Annotated[bool, typer.Option("--dummy", help="Random weights; every table says so.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model's repo.")]
PrefillChunk = Annotated[int | None, typer.Option(help="Tokens per prefill chunk (256 on a CPU, 8192 on a GPU).")]
PrefixReuse = Annotated[bool, typer.Option(help="Compute what prompts share once.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Make and measure the prompts, and run nothing.")]
Diagnostics = Annotated[
    bool, typer.Option("--diagnostics", help="Compare every layer with full attention: error, and mass recalled.")
]
