"""Every kernel compiles for GPUs that are not here, and keeps what it works on in registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evals.bench.kernels.compilation import compile_for

ROOT = Path(__file__).parent.parent
_KERNELS = {
    "chunk_logits", "group_scores", "select_chunks", "assign_slots", "copy_chunks", "rebuild_chunks", "attend_stretch",
    "join_stretches", "bound_pages", "attend_listed", "attend_code_stretch",
}  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim"),
    [(80, "bfloat16", 128), (90, "bfloat16", 128), (90, "bfloat16", 256), (80, "float16", 64)],
)
def test_kernels_compile_without_a_gpu(capability, dtype, head_dim):
    pytest.importorskip("triton", reason="kernels need Triton")
    compiled = compile_for([f"sm_{capability}"], dtype, head_dim)
    assert {c.kernel for c in compiled} == _KERNELS
    for kernel in compiled:
        assert kernel.target == f"sm_{capability}"
        assert 0 < kernel.registers <= 255
        assert kernel.stack_bytes <= 64, kernel
        assert kernel.shared_bytes <= 99 * 1024, kernel  # the least that a GPU of these has for one program


def test_kernels_are_compiled_as_they_are_launched():
    """Sizes that 16 divides make wide loads: without, the table would be of kernels that are never run."""
    pytest.importorskip("triton", reason="kernels need Triton")
    script = """
import torch
from shadowkv.kernels.compiled import launches, specialised
found = {each.kernel.fn.__name__: specialised(each) for each in launches(torch.bfloat16, 128)}
signature, constants, aligned = found["chunk_logits"]
assert {"q", "landmarks", "chunks", "head_dim", "stride_b", "stride_h"} <= set(aligned), aligned
assert "heads" not in aligned
assert signature["stride_b"] == "i32"
assert constants == {"GROUP": 16, "HEAD_DIM": 128, "BLOCK": 128, "INTERPRETED": 0}
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
