"""Every kernel compiles for GPUs that are not here, and keeps what it works on in registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evals.bench.kernels.compilation import compile_for

ROOT = Path(__file__).parent.parent
_KERNELS = {
    "chunk_logits", "group_scores", "select_chunks", "assign_slots", "copy_chunks", "rebuild_pairs", "rebuild_chunks",
    "attend_stretch", "join_stretches", "bound_pages", "attend_listed", "attend_code_stretch",
}  # fmt: skip
# Scales of fp16 are narrower than 4 bytes, one or two for a token; keys whose pairs lie in no usual way are read by
# index.
_NARROW_LOADS = {"copy_chunks": 8, "rebuild_pairs": 8, "rebuild_chunks": 80, "attend_code_stretch": 16}


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
        assert kernel.narrow_loads <= _NARROW_LOADS.get(kernel.kernel, 0), kernel


def test_narrow_loads_are_told_from_wide_ones():
    pytest.importorskip("triton", reason="kernels need Triton")
    from shadowkv.kernels.compiled import narrow_loads

    narrow = "@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];  ld.global.nc.L1::evict_last.v2.b8 {%r1, %r2}, [%rd1];"
    wide = "ld.global.v4.b32 { %r1 }, [ %rd1 ]; ld.global.b32 %r1, [%rd1]; ld.global.v2.b16 %r1, [%rd1]"
    assert narrow_loads(narrow) == 2
    assert narrow_loads(wide) == 0


def test_a_row_of_scores_is_held_in_registers():
    """Of 122K tokens: it is read once to look for the threshold, and once to write what reaches it."""
    pytest.importorskip("triton", reason="kernels need Triton")
    for kernel in compile_for(["sm_80", "sm_90"], "bfloat16", 128):
        if kernel.kernel == "select_chunks":
            assert "WHOLE=1" in kernel.variant
            assert kernel.stack_bytes == 0
            assert 32 < kernel.registers <= 128, "a program of 512 threads has no more"


def test_pairs_are_held_in_so_few_registers_that_two_programs_fit():
    """Of 64 tokens each: one program alone leaves a processor waiting for what it reads."""
    pytest.importorskip("triton", reason="kernels need Triton")
    for kernel in compile_for(["sm_80", "sm_90"], "bfloat16", 128):
        if kernel.kernel == "rebuild_pairs":
            assert 2 * 128 * kernel.registers <= 65536, kernel
            assert 2 * kernel.shared_bytes <= 164 * 1024, kernel


def test_kernels_are_compiled_as_they_are_launched():
    """Sizes that 16 divides make wide loads: without, the table would be of kernels that are never run."""
    pytest.importorskip("triton", reason="kernels need Triton")
    script = """
import torch
from shadowkv.kernels.compiled import launches, specialised
found = {each.kernel.fn.__name__: specialised(each) for each in launches(torch.bfloat16, 128)}
signature, constants, aligned = found["chunk_logits"]
assert {"q", "landmarks", "width", "head_dim", "stride_b", "stride_h"} <= set(aligned), aligned
assert not {"heads", "chunks"} & set(aligned)
assert signature["stride_b"] == "i32"
assert constants == {"GROUP": 16, "HEAD_DIM": 128, "BLOCK": 128, "INTERPRETED": 0}
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("target", "processors", "held_kib"), [("sm_80", 108, 164), ("sm_90", 132, 228)])
def test_programs_of_attention_at_once_are_as_many_as_fit_when_compiled(monkeypatch, target, processors, held_kib):
    pytest.importorskip("triton", reason="kernels need Triton")
    from shadowkv.kernels import launch
    from shadowkv.kernels.attention import program_bytes

    monkeypatch.setattr(launch, "_PROCESSORS", processors)
    monkeypatch.setattr(launch, "_SHARED_BYTES", held_kib * 1024)
    for head_dim in (64, 128, 256):
        (stretch,) = (x for x in compile_for([target], "bfloat16", head_dim) if x.kernel == "attend_stretch")
        by_shared, by_registers = held_kib * 1024 // (stretch.shared_bytes + 1024), 65536 // (128 * stretch.registers)
        found = launch.programs_at_once(program_bytes(head_dim, 2), torch.device("cpu"))
        assert found == processors * min(by_shared, by_registers), stretch
