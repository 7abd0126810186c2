"""`skv models` and `skv methods`: what can be named."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

MODELS_EPILOG = "Examples:  skv models  ·  skv models --json"
METHODS_EPILOG = "Examples:  skv methods  ·  skv methods --json  ·  skv methods --model llama3.1-8b"

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]


def models(as_json: Json = False) -> None:
    """List the models that can be named, with geometry, context and ShadowKV defaults."""
    from shadowkv.models.packs import pack_path
    from shadowkv.models.presets import presets

    rows: list[dict[str, Any]] = [
        {
            "name": p.name,
            "hub_id": p.hub_id,
            "context_tokens": p.context_tokens,
            "layers": p.layers,
            "q_heads": p.q_heads,
            "kv_heads": p.kv_heads,
            "head_dim": p.head_dim,
            "shadowkv": {"rank": p.rank, "budget": p.budget},
            "pack": p.pack,
            "gated": p.gated,
            "pulled": p.pack is not None and pack_path(p.pack) is not None,
        }
        for p in presets().values()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from cli.shared.render import print_table
    from evals.tables.table import Table

    columns = ["name", "Hub id", "context", "layers", "heads\nq/kv", "head\ndim", "ShadowKV\nrank,\nbudget", "files"]
    lines = [
        [
            r["name"],
            r["hub_id"],
            f"{r['context_tokens'] // 1024}k",
            str(r["layers"]),
            f"{r['q_heads']}/{r['kv_heads']}",
            str(r["head_dim"]),
            f"{r['shadowkv']['rank']}, {r['shadowkv']['budget']}",
            "pulled" if r["pulled"] else f"skv pull {r['pack']}" if r["pack"] else f"Hub{', gated' * r['gated']}",
        ]
        for r in rows
    ]
    print_table(
        Table(
            "models",
            columns,
            lines,
            "Also: a local folder, any Hub id of a RoPE decoder, or a .gguf file.",
            names=len(columns),
        )
    )


def methods(
    as_json: Json = False,
    model: Annotated[str, typer.Option(help="Preset whose geometry the bytes are for.")] = "llama3.1-8b",
) -> None:
    """List the methods with their parameters, defaults, paper and KV bytes per token."""
    from shadowkv.common.dims import Dims
    from shadowkv.contract.registry import methods as registered
    from shadowkv.contract.setting import format_value
    from shadowkv.models.presets import find_preset

    p = find_preset(model)
    dims = Dims(p.layers, p.q_heads, p.kv_heads, p.head_dim, element_bytes=2)
    rows: list[dict[str, Any]] = []
    for name, cls in registered().items():
        method = cls()
        held = method.bytes_per_token(dims)
        rows.append(
            {
                "name": name,
                "summary": cls.summary,
                "parameters": method.params(),
                "paper": f"https://arxiv.org/abs/{cls.paper}",
                "compared": cls.compared or "not compared",
                "bytes_per_token": {"model": model, "dtype": "bfloat16", "device": held.device, "host": held.host},
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from cli.shared.render import print_table
    from evals.tables.table import Table

    columns = ["name", "what it does", "parameters and defaults", "device", "host", "arXiv"]
    lines = [
        [
            r["name"],
            r["summary"],
            " ".join(f"{key}={format_value(value)}" for key, value in r["parameters"].items()) or "–",
            str(r["bytes_per_token"]["device"]),
            str(r["bytes_per_token"]["host"]),
            r["paper"].rpartition("/")[2],
        ]
        for r in rows
    ]
    caption = (
        "Spell them as -m shadowkv:rank=64,budget=256; repeat -m to compare. Any of them can start from a sparse "
        "prefill: -m shadowkv+minference. " + _compared(rows)
    )
    print_table(
        Table(f"methods (bytes per prompt token on {model} in bf16)", columns, lines, caption, names=len(columns))
    )


def _compared(rows: list[dict[str, Any]]) -> str:
    """Which methods were held against their authors' code, in one sentence."""
    missing = [r["name"] for r in rows if r["compared"] == "not compared"]
    return (
        "Compared with their authors' code, on which revision and with what result: --json; "
        f"not compared: {', '.join(missing) or 'none'}."
    )
