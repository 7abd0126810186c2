"""The formats there are, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from evals.exports.lm_eval import write_lm_eval
from evals.exports.parquet import write_parquet
from evals.reporting.folders import Run
from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean

Export = Callable[[Sequence[Run], Path], list[Path]]  # runs, folder -> files written
EXPORTS: Mapping[str, Export] = MappingProxyType({"lm-eval": write_lm_eval, "parquet": write_parquet})


def find_export(name: str) -> Export:
    """The writer of a format; raises `SkvError` on an unknown one."""
    if name not in EXPORTS:
        raise SkvError(f"unknown export '{name}'{did_you_mean(name, EXPORTS)}; one of {', '.join(EXPORTS)}")
    return EXPORTS[name]
