"""`skv eval niah`."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from evals.manifest import Manifest
    from evals.niah.task import Niah
    from shadowkv.loading import ModelSource
    from shadowkv.method import Dims, Method

EPILOG = (
    "Examples:\n\n"
    "skv eval niah --model smollm2-135m\n\n"
    "skv eval niah --model smollm2-135m -m full -m shadowkv:rank=64,budget=256 -m quest:budget=256 --lengths 4k "
    "--depths 10\n\n"
    "skv eval niah --model llama3.1-8b --lengths 16k,64k,128k --depths 10 --rounds 3 --device cuda\n\n"
    "skv eval niah --model ./my-model --haystack book.txt --depths 0,50,100 --dry-run"
)


def niah(
    model: Annotated[str, typer.Option(help="Preset (skv models), folder, Hub id or .gguf file.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Method such as shadowkv:rank=64,budget=256; repeatable (skv methods)."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens; k = 1024.")] = "1k,2k,4k",
    depths: Annotated[str, typer.Option(help="How many depths, or a list of percentages: 5 or 0,25,100.")] = "5",
    haystack: Annotated[str, typer.Option(help="essays, synthetic, or a .txt, .json or .jsonl file.")] = "essays",
    protocol: Annotated[str, typer.Option(help="magic-number or kamradt.")] = "magic-number",
    rounds: Annotated[int, typer.Option(help="Different needles and haystack starts per cell.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of needles and haystack starts.")] = 0,
    samples: Annotated[int | None, typer.Option(help="At most this many prompts, the first ones of the grid.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Run folder; the same command continues it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (fp32 on a CPU, bf16 on a GPU), float32, bfloat16, float16.")
    ] = "auto",
    dummy: Annotated[bool, typer.Option("--dummy", help="Random weights; every table says so.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the model's repo.")
    ] = False,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Tokens per prefill chunk (256 on a CPU, 8192 on a GPU).")
    ] = None,
    prefix_reuse: Annotated[bool, typer.Option(help="Compute what prompts share once.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and run nothing.")] = False,
) -> int:
    """Needle in a haystack: does a method still find one fact at any depth of a long text?

    Each prompt is computed once and answered by every method. Scores are 1 if the answer contains the needle's
    number, else 0. Interrupt at will: the same command continues.
    """
    from cli.render import quieten_libraries
    from evals.niah.task import Niah, parse_depths, parse_lengths
    from shadowkv.loading import context_tokens, load_config, load_tokenizer, resolve
    from shadowkv.registry import parse_method

    quieten_libraries()
    chosen = [parse_method(spec) for spec in method or []]
    _check_numbers(dtype, prefill_chunk)
    source = resolve(model, dummy=dummy)
    config = load_config(source, trust_remote_code=trust_remote_code)
    task = Niah(
        lengths=parse_lengths(lengths, context_tokens(source, config)),
        depths=parse_depths(depths),
        haystack_spec=haystack,
        protocol=protocol,
        rounds=rounds,
        seed=seed,
        samples=samples,
        max_new_tokens=max_new_tokens,
    )
    device, dtype, dims = _placement(config, device, dtype)
    chosen = list(dict.fromkeys(chosen or _default_methods(source, dims)))
    for each in chosen:
        each.check(dims)
    examples = task.examples(load_tokenizer(source, trust_remote_code=trust_remote_code))
    if dry_run:
        _print_plan(source, config, dims, chosen, examples, as_json=as_json)
        return 0

    from evals.report import title, write_reports
    from evals.results import open_run
    from evals.runner import run_accuracy
    from shadowkv.engine import Engine
    from shadowkv.loading import load_model

    loaded = load_model(source, device=device, dtype=dtype, dummy=dummy, trust_remote_code=trust_remote_code)
    engine = Engine(loaded.model, prefill_chunk_tokens=prefill_chunk, reuse_prefix=prefix_reuse)
    manifest = _manifest(task, engine.prefill_chunk_tokens, loaded, chosen)
    folder_path = out or Path("results") / _folder_name(manifest)
    from cli.render import print_summary, progress

    with open_run(folder_path, manifest) as folder:
        if folder.repaired_lines and not quiet:
            print(f"skv: repaired an unfinished last line of {folder_path / 'samples.jsonl'}", file=sys.stderr)
        with progress(shown=not (quiet or as_json)) as on_step:
            run_accuracy(engine, loaded, task, examples, chosen, folder, on_step)
        rows = write_reports(folder_path)
        unscored = _unscored(folder.records.values(), examples, chosen)
    if as_json:
        print(json.dumps(_summary_json(folder_path, manifest, rows, unscored), indent=1))
    elif not quiet:
        print_summary(title(manifest), rows, manifest.notes)
        print(f"{folder_path}: run.json samples.jsonl summary.csv summary.md plots/heatmap.png")
    for record in unscored if not quiet else []:
        print(f"skv: unscored: {record.method} @ {record.length} {record.sample}: {record.error}", file=sys.stderr)
    return 1 if unscored else 0


def _check_numbers(dtype: str, prefill_chunk: int | None) -> None:
    from shadowkv.errors import SkvError
    from shadowkv.names import did_you_mean

    known = ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise SkvError(f"unknown dtype '{dtype}'{did_you_mean(dtype, known)}; one of {', '.join(known)}")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise SkvError(f"--prefill-chunk must be at least 1, got {prefill_chunk}")


def _placement(config: Any, device: str, dtype: str) -> tuple[str, str, Dims]:
    """Where and in what precision the model will run, and the geometry that follows."""
    import torch

    from shadowkv.cache import dims_of
    from shadowkv.loading import pick_device, pick_dtype

    device = pick_device(device)
    dtype = pick_dtype(device, dtype)
    return device, dtype, dims_of(config, getattr(torch, dtype).itemsize)


def _default_methods(source: ModelSource, dims: Dims) -> list[Method]:
    """Full attention, and the two others at the settings suggested for the model."""
    from shadowkv.registry import parse_method

    rank = source.preset.rank if source.preset else min(160, dims.width)
    budget = source.preset.budget if source.preset else 2048
    return [parse_method(s) for s in ("full", f"shadowkv:rank={rank},budget={budget}", f"quest:budget={budget}")]


def _manifest(task: Niah, prefill_chunk_tokens: int, loaded: Any, methods: list[Method]) -> Manifest:
    from evals.manifest import Manifest, plain, this_session

    dummy_note = ["dummy weights: scores mean nothing, only times and bytes do"] if loaded.dummy else []
    return Manifest(
        benchmark=task.benchmark,
        config={
            "protocol": task.protocol,
            "seed": task.seed,
            "max_new_tokens": task.max_new_tokens,
            "prefill_chunk_tokens": prefill_chunk_tokens,
        },
        methods={method.label: plain(method.params()) for method in methods},
        selection=plain(
            {"lengths": task.lengths, "depths": task.depths, "rounds": task.rounds, "samples": task.samples}
        ),
        model={
            "name": loaded.name,
            "source": loaded.source,
            "weights_sha256": loaded.weights_sha256,
            "dummy": loaded.dummy,
            "dtype": loaded.dtype,
            "device": loaded.device,
        },
        sources=task.sources(),
        notes=dummy_note + task.notes(),
        sessions=[this_session(["skv", *sys.argv[1:]], loaded.device)],
    )


def _folder_name(manifest: Manifest) -> str:
    """The same configuration always goes to the same folder."""
    fixed = json.dumps([manifest.config, manifest.model, manifest.sources], sort_keys=True)
    name = manifest.model["name"].replace("/", "--")
    return f"{manifest.benchmark}-{name}-{hashlib.sha256(fixed.encode()).hexdigest()[:8]}"


def _unscored(records: Any, examples: Any, methods: list[Method]) -> list[Any]:
    """Failed records of what this command asked for."""
    asked = {(e.task, e.length_tokens, e.sample) for e in examples}
    labels = {method.label for method in methods}
    wanted = [r for r in records if (r.task, r.length, r.sample) in asked and r.method in labels]
    return [r for r in wanted if r.score is None]


def _summary_json(path: Path, manifest: Manifest, rows: Any, unscored: list[Any]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "folder": str(path),
        "benchmark": manifest.benchmark,
        "model": manifest.model,
        "notes": manifest.notes,
        "rows": [asdict(row) for row in rows],
        "unscored": len(unscored),
    }


def _print_plan(
    source: ModelSource, config: Any, dims: Dims, methods: list[Method], examples: Any, *, as_json: bool
) -> None:
    """What a run would do: prompts and their token counts, memory per method."""
    from shadowkv.loading import weights_bytes

    longest = max(len(e.input_ids) for e in examples)
    weights = weights_bytes(config, dims.element_bytes)
    memory = {}
    for each in methods:
        held = each.bytes_per_token(dims)
        memory[each.label] = {"device_bytes": held.device * longest, "host_bytes": held.host * longest}
    plan: dict[str, Any] = {
        "model": source.name,
        "source": source.described,
        "answers": len(examples) * len(methods),
        "weights_bytes": weights,
        "prefill_kv_bytes": dims.full_bytes_per_token * longest,
        "methods": memory,
        "examples": [
            {"length": e.length_tokens, "sample": e.sample, "prompt_tokens": len(e.input_ids)} for e in examples
        ],
    }
    if as_json:
        print(json.dumps(plan, indent=1))
        return
    from cli.render import print_table

    print_table(
        f"{source.name} ({source.described}): {len(examples)} prompts x {len(methods)} methods",
        ["length", "sample", "prompt tokens"],
        [[str(e["length"]), e["sample"], str(e["prompt_tokens"])] for e in plan["examples"]],
    )
    print_table(
        f"planned KV memory at {longest} tokens (weights {weights / 2**30:.2f} GiB, "
        f"prefill {plan['prefill_kv_bytes'] / 2**30:.2f} GiB)",
        ["method", "device MiB", "host MiB"],
        [
            [label, f"{held['device_bytes'] / 2**20:.1f}", f"{held['host_bytes'] / 2**20:.1f}"]
            for label, held in memory.items()
        ],
        "Nothing was run.",
    )
