"""Every kernel compiles for GPUs that are not here, and keeps what it works on in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_SCRIPT = """
import json, sys
from shadowkv.kernels.compiled import compile_all
print(json.dumps([c._asdict() for c in compile_all([int(sys.argv[1])], [sys.argv[2]], [int(sys.argv[3])])]))
"""
_KERNELS = {
    "chunk_logits", "group_scores", "select_chunks", "assign_slots", "copy_chunks", "rebuild_chunks", "attend_stretch",
    "join_stretches", "bound_pages", "attend_listed",
}  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim"), [(80, "bf16", 128), (90, "bf16", 128), (90, "bf16", 256), (80, "fp16", 64)]
)
def test_kernels_compile_without_a_gpu(capability, dtype, head_dim):
    pytest.importorskip("triton", reason="kernels need Triton")
    # A process of its own: in this one kernels are interpreted.
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(capability), dtype, str(head_dim)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert {c["kernel"] for c in compiled} == _KERNELS
    for kernel in compiled:
        assert kernel["target"] == f"sm_{capability}"
        assert 0 < kernel["registers"] <= 255
        assert kernel["stack_bytes"] <= 64, kernel
        assert kernel["shared_bytes"] <= 48 * 1024, kernel
