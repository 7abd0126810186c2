"""Options that several commands have, declared once as dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cli.shared.sampling import SamplingOptions

MODEL_HELP = (
    "Preset (skv models), folder, Hub id or .gguf file. Default: smollm2-135m on a CPU; on a GPU the largest preset "
    "(by parameters) whose weights are here and fit it."
)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where, and in which type; and whether to say what is going on."""

    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto (fp32 on a CPU, bf16 on a GPU), float32, bfloat16, float16.")] = (
        "auto"
    )
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model's repo.")] = (
        False
    )
    self_check: Annotated[
        bool,
        typer.Option(
            "--self-check/--no-self-check",
            help="First see that the model computes through skv what it computes by itself.",
        ),
    ] = True
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing, as with SKV_OFFLINE=1.")] = False

    @property
    def silent(self) -> bool:
        """Whether nothing is to be told beside results and errors."""
        return self.quiet

    @property
    def instead(self) -> str:
        """What the command can be told where a model is not here, beside `--model PATH`."""
        return ""


@dataclass(frozen=True)
class WeightOptions(ModelOptions):
    """What commands that load weights can be told of them."""

    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA to merge into the weights (needs peft); another model.")
    ] = None
    allow_unexpected_weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Tensors of the files to leave aside, as 'model.layers.*.bias,lm_head.*'; repeatable, tables say so."
        ),
    ] = None


@dataclass(frozen=True)
class RunOptions(WeightOptions):
    """What every run that compares methods can be told."""

    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="Method such as shadowkv:rank=64,budget=256, or all, or a set such as @paper; repeatable.",
        ),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(help="Tokens that every method attends to in all, so that they compare: 512 or 256,512."),
    ] = None
    kv_bytes: Annotated[
        str | None,
        typer.Option(
            help="Device memory for the KV of the longest prompt, for every method that can choose: 64MiB or 25%,50%."
        ),
    ] = None
    out: Annotated[Path | None, typer.Option(help="Run folder; the same command continues it.")] = None
    dummy: Annotated[bool, typer.Option("--dummy", help="Random weights; every table says so.")] = False
    prefill_chunk_tokens: Annotated[
        int | None,
        typer.Option("--prefill-chunk", help="Tokens per prefill chunk (256 on a CPU, 8192 on a GPU)."),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout and nothing else.")] = (
        False
    )
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be run and the memory it takes, and run nothing.")
    ] = False

    @property
    def silent(self) -> bool:
        return self.quiet or self.as_json

    @property
    def instead(self) -> str:
        return ", or run random weights (--dummy)"


@dataclass(frozen=True)
class Settings(SamplingOptions, RunOptions):
    """What every accuracy benchmark can be told, whatever it measures."""

    engine: Annotated[
        str | None, typer.Option(help="For methods that have two: reference, fast, or auto (fast on a GPU).")
    ] = None
    reuse_prefix: Annotated[
        bool, typer.Option("--prefix-reuse/--no-prefix-reuse", help="Compute what prompts share once.")
    ] = True
    thinking: Annotated[
        str,
        typer.Option(help="Thoughts before an answer: on, off, or auto (off where the chat template has a switch)."),
    ] = "auto"
    thinking_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens for a thought, beside the answer's. Thoughts are never scored; cut off ones are told."
        ),
    ] = None
    question: Annotated[
        str | None,
        typer.Option(
            help="Where questions stand: in-prompt (default), after (methods take over the text alone), or both."
        ),
    ] = None
    workers: Annotated[
        int,
        typer.Option(help="Processes that share the prompts: each with a GPU, or a part of the CPU, of its own."),
    ] = 1
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Compute prompts anew per method, layer by layer: dense KV need not fit."),
    ] = False
    forced: Annotated[
        int | None,
        typer.Option(
            help="Feed every method the same tokens, so many, and compare distributions; nothing is answered."
        ),
    ] = None
    continuation: Annotated[
        str | None,
        typer.Option(help="What --forced feeds: text (what follows), greedy (full attention's answer), or a file."),
    ] = None
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Feed forced tokens as decoding does: slower, the same but rounding.")
    ] = False
    diagnostics: Annotated[
        bool, typer.Option("--diagnostics", help="Compare every layer with full attention: error, and mass recalled.")
    ] = False


def with_options(group: type, name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the fields of the dataclass `group` as options, and one of them, filled in, as `name`.

    Typer reads the options of a command from its signature, so the command gets one that holds both kinds.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        # Not eval_str: an inherited field's type is a name of the module that its own class stands in.
        types = get_type_hints(group, include_extras=True)
        declared = inspect.signature(group).parameters.values()
        shared = [parameter.replace(annotation=types[parameter.name]) for parameter in declared]
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != name]

        @wraps(command)
        def run(**values: Any) -> int:
            chosen = group(**{field.name: values.pop(field.name) for field in shared})
            return command(**{name: chosen}, **values)

        ordered = sorted([*own, *shared], key=lambda parameter: parameter.default is not parameter.empty)
        keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in ordered]
        vars(run)["__signature__"] = signature.replace(parameters=keywords)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
        return run

    return decorate
