"""The bench's inputs for kernels and their twins, with the rotary embedding of any model family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import tiny_model

from evals.bench.kernels import cases as kernel_cases
from shadowkv.anatomy.rope import Rope
from shadowkv.anatomy.rotary_table import rotary_table


@dataclass(frozen=True)
class Case(kernel_cases.Case):
    """Geometry of one comparison, and whose rotary embedding it has."""

    family: str = "llama"


def key_inputs(case: Case) -> dict[str, Any]:
    """As in `evals.bench.kernels.cases`, with the table that the family's own functions give."""
    model = tiny_model(case.family, head_dim=case.head_dim, max_position_embeddings=4096)
    like = torch.empty(1, case.head_dim, dtype=case.dtype, device=case.device)
    table = rotary_table(Rope(model.to(case.device)), 0, case.head_dim, case.tokens, case.tokens, like)
    return kernel_cases.key_inputs(case, table)
