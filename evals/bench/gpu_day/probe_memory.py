"""Probes of what the fast engine is built on: a kernel that reads the host's memory, a graph with a side stream."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CHUNK = 8


def triton_kernel(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Whether a kernel compiles and copies chunks as its plain-torch twin does. On a CPU it is interpreted."""
    from shadowkv.kernels.backend import interpreted

    values = torch.randn(2, 2, 64 * _CHUNK, 64, device=device)
    return {"differs_by": _gathered(values, device)[0], "how": "interpreted" if interpreted() else "compiled"}


def registered_memory(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Whether a kernel reads host memory registered in place, and how fast: random chunks of 2 kB."""
    from shadowkv.tensors.pinned import empty_pinned

    values = empty_pinned((4, 8, 2**14, 128), torch.bfloat16)  # 128 MiB
    values.normal_()
    difference, moved, call = _gathered(values, device)
    return {
        "pinned": values.is_pinned(),
        "differs_by": difference,
        "chunks_gb_s": round(moved / _event_ms(call) / 1e6, 1),
    }


def graph_with_a_side_stream(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Whether a capture may fork to a side stream and join it, and its replay computes what was asked."""
    from shadowkv.tensors.streams import beside

    x, beside_it, both = (torch.zeros(1024, device=device) for _ in range(3))

    def step() -> None:
        with beside(device) as wait:
            torch.mul(x, 2, out=beside_it)
        torch.add(x, 1, out=both)
        wait()
        both.add_(beside_it)

    step()  # the side stream is made before any capture
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.fill_(3)
    graph.replay()
    torch.cuda.synchronize(device)
    if not bool((both == 10).all()):
        raise ValueError(f"the replay gave {both[0].item()}, not 10")
    return {"replay_ms": round(_event_ms(graph.replay), 4)}


def registration_rates(device: torch.device, tiny: bool) -> dict[str, Any]:
    """What pages of the host cost, shared ones of 4 kB and private ones that may be large: s/GiB, GB/s of chunks.

    And s/GiB, touching and registering together, as the engine takes its memory.
    """
    from shadowkv.tensors.pinned import empty_pinned

    found: dict[str, Any] = {}
    for name, huge in (("shared", False), ("private_huge", True)):
        pages = mmap.mmap(-1, 2**31, flags=mmap.MAP_ANONYMOUS | (mmap.MAP_PRIVATE if huge else mmap.MAP_SHARED))
        if huge:
            pages.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(pages, dtype=torch.bfloat16)
        began = time.perf_counter()
        flat.view(torch.int16).zero_()
        touched = time.perf_counter()
        error = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
        ended = time.perf_counter()
        found |= {f"{name}_touch_s_gib": round((touched - began) / 2, 3), f"{name}_error": error}
        if error:
            continue
        found[f"{name}_register_s_gib"] = round((ended - touched) / 2, 3)
        _, moved, call = _gathered(flat.view(8, 8, -1, 128), device)
        found[f"{name}_chunks_gb_s"] = round(moved / _event_ms(call) / 1e6, 1)
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())
    began = time.perf_counter()
    ours = empty_pinned((2**31,), torch.uint8)
    found |= {"ours_s_gib": round((time.perf_counter() - began) / 2, 3), "ours_pinned": ours.is_pinned()}
    return found


def refused_registration(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Whether the kernel after a refused registration runs: the error must not stay and be taken for its own."""
    flat = torch.frombuffer(mmap.mmap(-1, 2**24), dtype=torch.uint8)
    cudart = torch.cuda.cudart()
    first = int(cudart.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
    second = int(cudart.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))  # registered already: refused
    try:
        torch.ones(8, device=device).add_(1)
        after = "runs"
    except RuntimeError as error:
        after = str(error).splitlines()[0]
    torch.ones(8, device=device).add_(1)
    cudart.cudaHostUnregister(flat.data_ptr())
    return {"registered": first, "refused_by": second, "next_kernel": after}


def _gathered(values: Tensor, device: torch.device) -> tuple[float, int, Callable[[], object]]:
    """How far chunks that a kernel fetches are from those of plain torch, their bytes, and the call that fetches.

    values [B,H,n,D], anywhere that a kernel can read.
    """
    from shadowkv.kernels import slots, twins
    from shadowkv.tensors.stored import Stored

    batch, heads, tokens, head_dim = values.shape
    count = min(256, tokens // _CHUNK)
    rows = [torch.randperm(tokens // _CHUNK)[:count] for _ in range(batch * heads)]
    held = torch.stack(rows).view(batch, heads, count).int()
    fill = torch.arange(count).int().expand(batch, heads, count).contiguous()
    out = torch.zeros(batch, heads, count * _CHUNK, head_dim, dtype=values.dtype, device=device)
    expected = torch.zeros(out.shape, dtype=values.dtype, device=values.device)
    stored = Stored("native", (values,))
    slots.fill_values(stored, held.to(values.device), fill.to(values.device), _CHUNK, expected)
    placed, filled = held.to(device), fill.to(device)

    def call() -> object:
        return twins.fill_values(stored, placed, filled, _CHUNK, out)

    call()
    return float((out.cpu().float() - expected.cpu().float()).abs().max()), out.nbytes, call


def _event_ms(call: Callable[[], object], times: int = 20) -> float:
    """The median by the GPU's own clock."""
    call()
    torch.cuda.synchronize()
    found: list[float] = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return sorted(found)[times // 2]
