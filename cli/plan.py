"""`skv plan`: what a method would need and reach on a GPU that nobody has rented yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Examples:\n\n"
    "skv plan\n\n"
    "skv plan --model llama3.1-8b --gpu a100-80g --context 60k,122k -m full -m shadowkv -m quest\n\n"
    "skv plan --model llama3.1-8b --gpu h200 --context 122k -m @paper --host-memory 128GB\n\n"
    "skv plan --model llama3-8b-1m --gpu a100-80g --context 122k -m shadowkv --as-published\n\n"
    "skv plan --model ./my-model --gpu my-gpu.yaml --batch 8 --out plans"
)
_MODEL, _GPU = "llama3.1-8b", "h200"
_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            help="Preset (skv models), folder or Hub id; only its config is read. Default: llama3.1-8b, which the "
            "paper's claims are about."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="a100-80g, h200, rtx4090, ... or a .json or .yaml file with its figures. Default: the GPU that is "
            "here if it is a known one, else h200."
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Prompt lengths in tokens, k = 1024 (default: the model's, 1/2, 1/4 and 1/8 of it)."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Method such as shadowkv:rank=64, or all, or a set such as @paper."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Tokens that every method attends to in all: 512 or 256,512.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Plan for this batch instead of the largest that fits.")] = None,
    memory_cap: Annotated[str | None, typer.Option(help="Use no more of the GPU's memory: 40GB or 40GiB.")] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Memory that may be pinned on the host: 128GB (default: unlimited).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32, of weights and cache.")] = "bfloat16",
    as_published: Annotated[
        bool, typer.Option("--as-published", help="ShadowKV by its authors' engine, not by this repository's.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for plan.png (over the context), plan.md and plan.json.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model's repo.")] = (
        False
    ),
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing, as with SKV_OFFLINE=1.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")] = False,
) -> int:
    """Predict memory, largest batch and decoding speed. Needs no GPU and no weights.

    Bytes are those of this repository's caches; times are a roofline over rates that are reached in practice, which an
    engine that copies more than it must does not keep. Plans come by context and, within it, by method, as asked.
    """
    import json

    from cli.shared.checks import check_dtype, check_writable
    from cli.shared.choosing import choose, parse_budgets, parse_specs, tell_unsupported
    from cli.shared.render import print_table
    from evals.common.lengths import parse_lengths
    from evals.tables.planning import Setup, parts_table, plan_all, plan_table, write_plot
    from evals.tables.planning import as_json as to_json
    from shadowkv.common.errors import SkvError
    from shadowkv.common.sizes import parse_bytes
    from shadowkv.models.loading import context_tokens, load_config
    from shadowkv.models.model_size import model_size
    from shadowkv.models.resolving import resolve
    from shadowkv.planning.gpus import find_gpu

    check_dtype(dtype, _ELEMENT_BYTES)
    if batch is not None and batch < 1:
        raise SkvError(f"--batch must be at least 1, got {batch}")
    if out is not None:
        check_writable(out)
    model, gpu = _settled(model, gpu, silent=as_json)
    card = find_gpu(gpu)
    cap = None if memory_cap is None else parse_bytes(memory_cap, "--memory-cap")
    host = None if host_memory is None else parse_bytes(host_memory, "--host-memory")
    specs, budgets = parse_specs(methods or ()), parse_budgets(budget)
    source = resolve(model, config_only=True, offline=offline)
    config = load_config(source, trust_remote_code=trust_remote_code)
    longest = context_tokens(source, config)
    asked = context or ",".join(str(longest // part) for part in (8, 4, 2, 1))
    contexts = parse_lengths(asked, longest)
    size = model_size(config, _ELEMENT_BYTES[dtype], trust_remote_code=trust_remote_code)
    size.require_served()
    chosen = choose(specs, budgets, source, size.dims)
    tell_unsupported(chosen.unsupported)
    setup = Setup(source.name, size, card, batch, cap, host, as_published)
    rows = plan_all(setup, contexts, chosen.methods)
    if as_published and not any(row.published for row in rows):
        raise SkvError("--as-published is about shadowkv, which is not among the methods; add -m shadowkv")
    told = {"plans": [to_json(row.plan) for row in rows]}
    tables = [plan_table(setup, rows), parts_table(setup, rows)]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        (out / "plan.md").write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")
        write_plot(out / "plan.png", setup, rows)
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        print_table(tables[0], narrow=plan_table(setup, rows, dense=True))
        print_table(tables[1])
        if out is not None:
            print(f"{out}: plan.json plan.md plan.png")
    return 1 if chosen.unsupported else 0


def _settled(model: str | None, gpu: str | None, *, silent: bool) -> tuple[str, str]:
    """What is planned for, with what was not asked for said in one line."""
    from cli.shared.render import say

    told = []
    if model is None:
        model = _MODEL
        told.append(f"{model}, which the paper's claims are about (--model)")
    if gpu is None:
        gpu = _gpu_here()
        told.append(f"{gpu}, the GPU that is here (--gpu)" if gpu else f"{_GPU}, as no known GPU is here (--gpu)")
    if told and not silent:
        say(f"planning for {' on '.join(told)}")
    return model, gpu or _GPU


def _gpu_here() -> str | None:
    """The name of this machine's GPU, if it is one of the table."""
    import torch

    from shadowkv.planning.gpus import gpu_called

    found = gpu_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return found.name if found else None
