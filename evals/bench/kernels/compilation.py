"""What every kernel takes of a GPU that need not be here: compiled in a process of its own, which interprets none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean
from shadowkv.kernels.backend import CompiledKernel

TARGETS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
TRITON_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_SCRIPT = """
import json, sys
from dataclasses import asdict
from shadowkv.kernels.compiled import compile_all
capabilities, dtype, head_dim = json.loads(sys.argv[1])
print(json.dumps([asdict(compiled) for compiled in compile_all(capabilities, [dtype], [head_dim])]))
"""


def parse_targets(text: str) -> tuple[str, ...]:
    """Read `sm_80,sm_90`. Raises `SkvError` on what kernels are not compiled for, with the nearest that they are."""
    asked = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    for target in asked:
        if target not in TARGETS:
            raise SkvError(f"unknown target '{target}'{did_you_mean(target, TARGETS)}; one of {', '.join(TARGETS)}")
    if not asked:
        raise SkvError("no targets given; for example --compile sm_80,sm_90")
    return asked


def compile_for(targets: Sequence[str], dtype: str, head_dim: int) -> list[CompiledKernel]:
    """Every kernel, compiled for heads of a size that is a power of two. dtype: torch's name for it."""
    asked = [[int(target.removeprefix("sm_")) for target in targets], TRITON_TYPES[dtype], head_dim]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(asked)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"kernels do not compile for {', '.join(targets)}:\n{done.stderr}")
    return [CompiledKernel(**each) for each in json.loads(done.stdout)]
