"""Compile every kernel for a GPU that need not be here, and say what it takes of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from shadowkv.common.errors import SkvError
from shadowkv.kernels.attention import attend_stretch, block_of, join_stretches
from shadowkv.kernels.backend import CompiledKernel
from shadowkv.kernels.choose import assign_slots, select_chunks
from shadowkv.kernels.fetch import copy_chunks
from shadowkv.kernels.pages import attend_listed, bound_pages, pages_at_once
from shadowkv.kernels.rebuild import rebuild_chunks, tokens_at_once
from shadowkv.kernels.scores import chunk_logits, group_scores, landmarks_at_once


class Variant(NamedTuple):
    """One kernel for one set of types and sizes."""

    kernel: Any
    pointers: dict[str, str]  # argument -> type of what it points to
    sizes: dict[str, int]  # what it is compiled for
    warps: int
    floats: tuple[str, ...] = ()


def variants(dtype: str, head_dim: int) -> Iterator[Variant]:
    """Every kernel as the engine launches it for heads of this size in this type ("bf16" or "fp16")."""
    group, plain = 16, {"INTERPRETED": 0}
    partial = dict.fromkeys(("part", "part_max", "part_sum"), "fp32")
    yield Variant(
        chunk_logits,
        {"q": dtype, "landmarks": dtype, "counts": "i32"} | dict.fromkeys(("logits", "block_max", "block_sum"), "fp32"),
        {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK": landmarks_at_once(head_dim), **plain},
        4,
        ("scaling",),
    )
    scored = dict.fromkeys(("logits", "block_max", "block_sum", "scores"), "fp32")
    yield Variant(
        group_scores,
        {**scored, "counts": "i32"},
        {"GROUP": group, "BLOCK": landmarks_at_once(head_dim), "BLOCKS": 64},
        4,
    )
    numbers = {"numbers": "i32", "chosen": "i32"}
    yield Variant(select_chunks, {"scores": "fp32", **numbers}, {"BLOCK": 8192}, 16)
    yield Variant(assign_slots, dict.fromkeys(("chosen", "held", "fill"), "i32"), {"SLOTS": 512, "TILE": 32}, 4)
    placed = {"held": "i32", "fill": "i32", "out": dtype}
    for code, (codes, scales) in enumerate([(dtype, dtype), ("i8", "fp16"), ("i8", "fp16"), ("u8", "fp16")]):
        yield Variant(
            copy_chunks,
            {"codes": codes, "scales": scales, "zeros": scales, **placed},
            {"CODE": code, "CHUNK": 8, "HEAD_DIM": head_dim},
            1,
        )
    table = {"cos": dtype, "sin": dtype, "pair": "i32", "partner": "i32", "sign": "fp32"}
    for coded, coefficients, scales in ((0, dtype, dtype), (1, "i8", "fp16")):
        yield Variant(
            rebuild_chunks,
            {"coefficients": coefficients, "scales": scales, "vectors": dtype, **table, **placed},
            {"CODED": coded, "TOKENS": tokens_at_once(head_dim), "RANK": 32, "HEAD_DIM": head_dim, **plain},
            8,
        )
    yield Variant(
        attend_stretch,
        {"q": dtype, "k": dtype, "v": dtype, "spans": "i32", **partial},
        {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK": block_of(head_dim), **plain},
        4,
        ("scaling",),
    )
    yield Variant(
        bound_pages,
        {"q": dtype, "low": dtype, "high": dtype, "lengths": "i32", "bounds": "fp32"},
        {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK": pages_at_once(head_dim), **plain},
        4,
    )
    yield Variant(
        attend_listed,
        {"q": dtype, "k": dtype, "v": dtype, "pages": "i32", "lengths": "i32", **partial},
        {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK": block_of(head_dim), **plain},
        4,
        ("scaling",),
    )
    yield Variant(join_stretches, {**partial, "out": dtype}, {"SPLITS": 32, "HEAD_DIM": head_dim}, 4)


def compile_variant(variant: Variant, capability: int) -> CompiledKernel:
    """Compile for compute capability 80, 90 and so on. Raises `SkvError` under the interpreter."""
    kernel = variant.kernel
    if not isinstance(kernel, JITFunction):
        raise SkvError("kernels cannot be compiled under TRITON_INTERPRET=1")
    signature = {
        name: f"*{variant.pointers[name]}"
        if name in variant.pointers
        else "constexpr"
        if name in variant.sizes
        else "fp32"
        if name in variant.floats
        else "i64"
        if name.endswith(("_b", "_h"))
        else "i32"
        for name in kernel.arg_names
    }
    sizes = {(kernel.arg_names.index(name),): value for name, value in variant.sizes.items()}
    # What the launcher finds out of real arguments: pointers and sizes that are multiples of 16.
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options={"num_warps": variant.warps})
    registers, spilled = _resources(built.asm["cubin"])
    spelled = ",".join(f"{name}={value}" for name, value in variant.sizes.items())
    types = ",".join(sorted(set(variant.pointers.values())))
    return CompiledKernel(
        kernel.fn.__name__, f"{types};{spelled}", f"sm_{capability}", registers, spilled, built.metadata.shared
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack per thread, which is where spilled ones go."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {said}")
    return int(found[1]), int(found[2])


def compile_all(
    capabilities: Sequence[int], dtypes: Sequence[str] = ("bf16",), head_dims: Sequence[int] = (64, 128, 256)
) -> Iterator[CompiledKernel]:
    """Every variant for every capability, type and head size."""
    for capability in capabilities:
        for dtype in dtypes:
            for head_dim in head_dims:
                for variant in variants(dtype, head_dim):
                    yield compile_variant(variant, capability)
