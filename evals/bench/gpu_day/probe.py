"""What a machine can do, below the engine: each finding by itself, and written as soon as it is there.

It needs torch and Triton, and for a decoder layer transformers. What only a GPU has says so elsewhere: nothing is
imitated.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from evals.bench.gpu_day.probe_dense import compiled_dense_layer, dense_layer
from evals.bench.gpu_day.probe_memory import (
    graph_with_a_side_stream,
    refused_registration,
    registered_memory,
    registration_rates,
    triton_kernel,
)
from evals.bench.timing import Clock, step_times
from shadowkv.common.wording import one_line

_PACKAGES = ("torch", "triton", "transformers", "numpy", "greenlet", "platformdirs")
_QUERIED = (
    "driver_version",
    "pcie.link.gen.max",
    "pcie.link.width.max",
    "clocks.max.sm",
    "power.limit",
    "ecc.mode.current",
)


@dataclass(frozen=True)
class Finding:
    """What one probe found. status: ok, failed, or skipped with the reason in `error`."""

    name: str
    status: str
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Probe:
    """`look(device, tiny)` returns values by name with their units; it raises what it meets."""

    look: Callable[[torch.device, bool], dict[str, Any]]
    needs_cuda: bool = False


def versions(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Of Python, the packages that decide what runs, and the CUDA that torch was built for."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch_cuda": torch.version.cuda}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def host(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Cores, memory, how much of it a process may lock, and whether the system gives large pages."""
    import os

    said = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    pages = Path("/sys/kernel/mm/transparent_hugepage")
    return {
        "cores": os.cpu_count(),
        "memory_kb": int(said["MemTotal"].split()[0]),
        "available_kb": int(said["MemAvailable"].split()[0]),
        "lockable_bytes": None if limit == resource.RLIM_INFINITY else limit,
        **{
            f"huge_pages_{f.name}": f.read_text().strip()
            for f in (pages / "enabled", pages / "shmem_enabled")
            if f.is_file()
        },
    }


def card(device: torch.device, tiny: bool) -> dict[str, Any]:
    """What torch and, where it answers, nvidia-smi say of the GPU."""
    said = torch.cuda.get_device_properties(device)
    found = {
        "name": said.name,
        "capability": f"sm_{said.major}{said.minor}",
        "processors": said.multi_processor_count,
        "l2_bytes": said.L2_cache_size,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
        "total_bytes": torch.cuda.mem_get_info(device)[1],
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERIED)}", "--format=csv,noheader", "-i", f"GPU-{said.uuid}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return found | {"nvidia_smi": one_line(error)}
    return found | dict(zip(_QUERIED, map(str.strip, asked.stdout.split(",")), strict=False))


def rates(device: torch.device, tiny: bool) -> dict[str, Any]:
    """GB/s of a copy (read and written) and, on a GPU, of one from pinned memory; TFLOP/s of square products."""
    clock, count, size = Clock(device), (2**20, 256) if tiny else (2**30, 8192), 3 if tiny else 10
    bytes_, side = count
    source, target = (torch.empty(bytes_, dtype=torch.uint8, device=device) for _ in range(2))

    def median_s(call: Callable[[], object]) -> float:
        times = sorted(step_times(lambda: (call(), None)[1], 2, size, clock))
        return times[len(times) // 2] / 1000

    found = {"copy_gb_s": 2 * bytes_ / median_s(lambda: target.copy_(source)) / 1e9}
    if device.type == "cuda":
        pinned = torch.empty(bytes_, dtype=torch.uint8, pin_memory=True)
        found["copy_from_host_gb_s"] = bytes_ / median_s(lambda: target.copy_(pinned, non_blocking=True)) / 1e9
        found["copy_to_host_gb_s"] = bytes_ / median_s(lambda: pinned.copy_(target, non_blocking=True)) / 1e9
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        name = f"matmul_{str(dtype).removeprefix('torch.')}_tflop_s"
        found[name] = 2 * side**3 / median_s(lambda a=a, b=b: torch.mm(a, b)) / 1e12  # type: ignore[misc]
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def eigenvectors(device: torch.device, tiny: bool) -> dict[str, Any]:
    """ms of what factorising the keys of one row and layer takes: a Gram matrix in fp64 and its eigenvectors.

    All of them, and the leading ones alone, of a spectrum that decays as that of keys does.
    """
    from shadowkv.tensors.low_rank import leading

    tokens, width, rank = (1024, 256, 32) if tiny else (8192, 1024, 160)
    x = torch.randn(1, tokens, width, device=device, dtype=torch.float64)
    x *= torch.arange(1, width + 1, device=device) ** -0.5
    clock, gram = Clock(device), x.mT @ x

    def ms(call: Callable[[], object]) -> float:
        return round(min(step_times(lambda: (call(), None)[1], 1, 3, clock)), 3)

    return {
        "gram_ms": ms(lambda: x.mT @ x),
        "eigh_ms": ms(lambda: torch.linalg.eigh(gram)),
        "leading_ms": ms(lambda: leading(gram, rank)),
        "leading_settled": leading(gram, rank) is not None,
        "width": width,
        "rank": rank,
    }


# What may break the process's hold on the GPU comes last.
PROBES: Mapping[str, Probe] = MappingProxyType(
    {
        "versions": Probe(versions),
        "host": Probe(host),
        "card": Probe(card, needs_cuda=True),
        "rates": Probe(rates),
        "triton_kernel": Probe(triton_kernel),
        "registered_memory": Probe(registered_memory, needs_cuda=True),
        "graph_with_a_side_stream": Probe(graph_with_a_side_stream, needs_cuda=True),
        "eigenvectors": Probe(eigenvectors),
        "dense_layer": Probe(dense_layer),
        "compiled_dense_layer": Probe(compiled_dense_layer, needs_cuda=True),
        "registration_rates": Probe(registration_rates, needs_cuda=True),
        "refused_registration": Probe(refused_registration, needs_cuda=True),
    }
)


def run_probes(file: Path, *, tiny: bool, tell: Callable[[Finding], None]) -> list[Finding]:
    """All findings, in `file` as JSON too, which is written after each."""
    device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
    findings: list[Finding] = []
    for name, probe in PROBES.items():
        findings.append(_look(name, probe, device, tiny))
        _write(file, device, findings)
        tell(findings[-1])
    return findings


def _look(name: str, probe: Probe, device: torch.device, tiny: bool) -> Finding:
    if probe.needs_cuda and device.type != "cuda":
        return Finding(name, "skipped", 0.0, error="needs CUDA")
    began = time.perf_counter()
    try:
        found, status, error = probe.look(device, tiny), "ok", None
    except Exception as raised:  # whatever a machine may lack: the finding is that it does
        found, status, error = {}, "failed", f"{type(raised).__name__}: {one_line(raised)}"
    return Finding(name, status, round(time.perf_counter() - began, 2), found, error)


def _write(file: Path, device: torch.device, findings: Sequence[Finding]) -> None:
    told = {"device": str(device), "findings": [asdict(finding) for finding in findings]}
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
