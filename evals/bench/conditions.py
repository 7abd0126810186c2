"""What else a measurement may have suffered from: load, clocks, other processes; and which machine it was."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def machine_name(session_machine: Mapping[str, Any]) -> str:
    """The part of a machine that times depend on, from `Session.machine`."""
    what = session_machine.get("gpu") or session_machine["cpu"]
    return f"{what}, {session_machine['cores']} cores, {session_machine['torch_threads']} threads"


def conditions(device: torch.device) -> dict[str, Any]:
    """Now: load average per core, and of a GPU its clocks and how many other processes use it, where readable."""
    found: dict[str, Any] = {"load_per_core": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)}
    if device.type != "cuda":
        return found
    values = _smi(f"--query-gpu={','.join(_CLOCKS)}", device)
    found |= dict(zip(_CLOCKS, values[0], strict=False)) if values else {}
    pids = _smi("--query-compute-apps=pid", device)
    if pids is not None:
        # This process is one of them, under a number of the host's where it runs in a container.
        found["other_gpu_processes"] = max(len(pids) - 1, 0)
    return found


def _smi(query: str, device: torch.device) -> list[list[str]] | None:
    """Rows of an nvidia-smi query, None where it cannot be asked."""
    # By its own name: CUDA_VISIBLE_DEVICES numbers GPUs anew, and nvidia-smi does not ask it.
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def noise_note(all_conditions: Sequence[Mapping[str, Any]]) -> str:
    """One sentence about how quiet the machine was, from what was read before each measurement."""
    loads = [float(c["load_per_core"]) for c in all_conditions if "load_per_core" in c]
    said = [f"load per core {min(loads):.2f} to {max(loads):.2f}" if loads else "load not readable"]
    clocks = [float(c["clocks.sm"]) for c in all_conditions if str(c.get("clocks.sm", "")).isdecimal()]
    if clocks:
        said.append(f"SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz")
    others = [int(c["other_gpu_processes"]) for c in all_conditions if "other_gpu_processes" in c]
    if others:
        said.append(f"up to {max(others)} other processes on the GPU")
    return ", ".join(said)
