"""Every kernel compiles for GPUs that are not here, and keeps what it works on in registers."""

from __future__ import annotations

import pytest

from evals.bench.kernels.compilation import compile_for

_KERNELS = {
    "chunk_logits", "group_scores", "select_chunks", "assign_slots", "copy_chunks", "rebuild_chunks", "attend_stretch",
    "join_stretches", "bound_pages", "attend_listed",
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
        assert kernel.shared_bytes <= 48 * 1024, kernel
