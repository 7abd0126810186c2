"""The bench's inputs for kernels and their twins, with the rotary embedding of any model family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import tiny_model

from evals.bench.kernels import cases as bench_cases
from shadowkv.anatomy.rope import Rope
from shadowkv.anatomy.rotary_table import Pairing, RotaryTable, rotary_table


@dataclass(frozen=True)
class Case(bench_cases.Case):
    """Geometry of one comparison, and whose rotary embedding it has."""

    family: str = "llama"


def key_inputs(case: Case, table: RotaryTable | None = None) -> dict[str, Any]:
    """As in `evals.bench.kernels.cases`, with the table that the family's own functions give, or this one."""
    if table is not None:
        return bench_cases.key_inputs(case, table)
    model = tiny_model(case.family, head_dim=case.head_dim, max_position_embeddings=4096)
    like = torch.empty(1, case.head_dim, dtype=case.dtype, device=case.device)
    table = rotary_table(Rope(model.to(case.device)), 0, case.head_dim, case.tokens, case.tokens, like)
    return bench_cases.key_inputs(case, table)


def paired_table(case: Case, way: str) -> RotaryTable:
    """Random angles for pairs that lie as `way` says: in halves, as neighbours, of part of the channels, or otherwise.

    "scaled" is halves with a norm behind them, whose weights the sign is times.
    """
    channels, size = torch.arange(case.head_dim), case.head_dim
    turned = {"still": 0, "part in halves": size // 2, "part as neighbours": size // 2}.get(way, size)
    pairs, mirrored = turned // 2, way == "mirrored"
    if mirrored:
        pair, partner = torch.minimum(channels, size - 1 - channels), size - 1 - channels
    elif "neighbours" in way:
        pair, partner = channels // 2, channels ^ 1
    else:
        pair, partner = channels % max(pairs, 1), (channels + pairs) % max(turned, 1)
    sign = torch.where(channels < partner, -1.0, 1.0) * (torch.rand(size) + 0.5 if way == "scaled" else 1.0)
    known = channels < turned
    pair, partner = torch.where(known, pair, 0).int(), torch.where(known, partner, channels).int()
    sign = torch.where(known, sign, 0.0)
    angles = torch.rand(case.tokens, max(pairs, 1)) * 6
    parts = (angles.cos().to(case.dtype), angles.sin().to(case.dtype), pair, partner, sign)
    return RotaryTable(*(part.to(case.device) for part in parts), Pairing.of(pair, partner, sign))
