"""Compile every kernel for a GPU that need not be here, and say what it takes of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from shadowkv.anatomy.rotary_table import Pairing, RotaryTable
from shadowkv.common.errors import SkvError
from shadowkv.kernels import attention, choose, fetch, pages, rebuild, scores
from shadowkv.kernels.backend import CompiledKernel
from shadowkv.kernels.coded import attention as coded_attention
from shadowkv.kernels.slots import Factors, Regions
from shadowkv.tensors.stored import CODINGS, Stored

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}
_ALIGNED = 16  # bytes of a pointer, and what a size has to be a multiple of, for the launcher to tell the compiler
_CODINGS = ("native", "int8", "fp8", "int4")  # bf16 is read as native is
# Llama 3.1 8B at 122K tokens, as the engine launches it: the compiler sees what these are multiples of.
_BATCH, _HEADS, _GROUP, _CHUNKS, _CHUNK, _RANK, _REGIONS = 8, 8, 4, 15616, 8, 160, Regions(2048, 384, 288)
_LANDMARKS = _CHUNKS - 36  # outliers and the newest have none, and there is room for 16 more: no multiple of anything
_PAGE, _PAGES_READ = 16, 128


class Launch(NamedTuple):
    """One launch of a kernel: what it was given."""

    kernel: Any
    given: dict[str, Any]
    warps: int


def launches(dtype: torch.dtype, head_dim: int) -> list[Launch]:
    """Every kernel as the engine launches it for heads of this size in this type, on tensors without memory."""
    found: list[Launch] = []

    def note(kernel: Any, *given: Any, grid: Any, warmup: bool, num_warps: int = 4, **by_name: Any) -> None:
        found.append(Launch(kernel, dict(zip(kernel.arg_names, given, strict=False)) | by_name, num_warps))

    with ExitStack() as patches:
        for module in (attention, choose, coded_attention, fetch, pages, rebuild, scores):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    patches.enter_context(patch.object(kernel, "run", partial(note, kernel)))
        _one_step(dtype, head_dim)
    return found


def _one_step(dtype: torch.dtype, head_dim: int) -> None:
    """Whatever a decode step of a layer may launch."""
    like = partial(torch.empty, device="meta", dtype=dtype)
    number = partial(torch.empty, device="meta", dtype=torch.int32)
    tokens, slots = _CHUNKS * _CHUNK, _REGIONS.slots // _CHUNK
    q, counts = like(_BATCH, _HEADS * _GROUP, 1, head_dim), number(_BATCH)
    k, v = (like(_BATCH, _HEADS, _REGIONS.tokens, head_dim) for _ in range(2))
    scored = scores.chunk_scores(q, like(_BATCH, _HEADS, _LANDMARKS, head_dim), 1.0, counts)
    chosen = choose.choose_chunks(scored, number(_BATCH, _HEADS, _LANDMARKS), slots)
    held = number(_BATCH, _HEADS, slots)
    fill = choose.plan_fill(chosen, held)
    for coding in _CODINGS:
        stored = Stored(coding, CODINGS[coding].encode(like(_BATCH, _HEADS, tokens, head_dim)))
        fetch.fill_values(stored, held, fill, _CHUNK, v)
    pair, partner = number(head_dim), number(head_dim)
    turns = [like(tokens, head_dim // 2) for _ in range(2)]
    for pairing in (Pairing(head_dim // 2, False), Pairing(head_dim // 4, True), None):
        rotary = RotaryTable(turns[0], turns[1], pair, partner, torch.empty(head_dim, device="meta"), pairing)
        for coding in ("native", "int8"):
            coefficients, *scale = CODINGS[coding].encode(like(_BATCH, tokens, _RANK))
            factors = Factors(coefficients, scale[0] if scale else None, like(_BATCH, _RANK, _HEADS * head_dim))
            rebuild.fill_keys(factors, rotary, held, fill, _CHUNK, k)
    attention.attend_resident(q, k, v, number(_BATCH, 4), _REGIONS, 1.0)
    whole = [like(_BATCH, _HEADS, tokens, head_dim) for _ in range(2)]
    for coding in ("int8", "fp8"):
        k_codes, v_codes = (Stored(coding, CODINGS[coding].encode(x)) for x in whole)
        coded_attention.attend_codes(q, k_codes, v_codes, number(_BATCH, 4)[:, 3], 1.0)
    extremes = [like(_BATCH, _HEADS, tokens // _PAGE, head_dim) for _ in range(2)]
    pages.page_bounds(q, extremes[0], extremes[1], counts, _PAGE)
    listed = number(_BATCH, _HEADS, _PAGES_READ)
    pages.attend_pages(q, whole[0], whole[1], listed, counts, _PAGE, 1.0)


class Specialised(NamedTuple):
    """What Triton's launcher tells the compiler of a launch."""

    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]  # arguments that are multiples of 16


def specialised(launch: Launch) -> Specialised:
    """The launcher's rules: a size of 1 is a constant, an integer is as wide as it has to be, and 16 divides it or not.

    Pointers are taken to be aligned, as those of whole tensors are.
    """
    signature, constants, aligned = dict[str, str](), dict[str, Any](), list[str]()
    for name in launch.kernel.arg_names:
        value = launch.given[name]
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            aligned.append(name)
        elif name.isupper() or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", int(value)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % _ALIGNED == 0:
                aligned.append(name)
    return Specialised(signature, constants, aligned)


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile for compute capability 80, 90 and so on."""
    kernel, (signature, constants, aligned) = launch.kernel, specialised(launch)
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={(place(name),): [["tt.divisibility", _ALIGNED]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options={"num_warps": launch.warps})
    registers, spilled = _resources(built.asm["cubin"])
    return CompiledKernel(
        kernel.fn.__name__,
        variant_of(launch),
        f"sm_{capability}",
        registers,
        spilled,
        built.metadata.shared,
        narrow_loads(built.asm["ptx"]),
    )


def narrow_loads(ptx: str) -> int:
    """Loads of global memory of less than 4 bytes a thread, once for each place in the code."""
    loads = re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bus](\d+)\b", ptx)
    return sum(int(many or 1) * int(bits) < 32 for many, bits in loads)


def variant_of(launch: Launch) -> str:
    """What a launch is compiled for: types, and what is written in capitals."""
    types = {_TYPES[value.dtype] for value in launch.given.values() if isinstance(value, Tensor)}
    sizes = (f"{name}={int(launch.given[name])}" for name in launch.kernel.arg_names if name.isupper())
    return f"{','.join(sorted(types))};{','.join(sizes)}"


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
    """Every launch for every capability, type and head size. Raises `SkvError` under the interpreter."""
    if not isinstance(attention.attend_stretch, JITFunction):
        raise SkvError("kernels cannot be compiled under TRITON_INTERPRET=1")
    named = {name: dtype for dtype, name in _TYPES.items()}
    for capability in capabilities:
        for dtype in dtypes:
            for head_dim in head_dims:
                found = {(each.kernel.fn.__name__, variant_of(each)): each for each in launches(named[dtype], head_dim)}
                for launch in found.values():
                    yield compile_launch(launch, capability)
