"""What else a measurement may have suffered from: load, clocks, other processes; and which machine it was."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import torch

# By the name that CSV queries have for it, where an answer in XML has it: drivers moved the power.
_WHERE = MappingProxyType(
    {
        "clocks.sm": ("clocks/sm_clock",),
        "clocks.mem": ("clocks/mem_clock",),
        "temperature.gpu": ("temperature/gpu_temp",),
        "power.draw": (
            "gpu_power_readings/power_draw",
            "gpu_power_readings/average_power_draw",
            "gpu_power_readings/instant_power_draw",
            "power_readings/power_draw",
        ),
    }
)


def machine_name(session_machine: Mapping[str, Any]) -> str:
    """The part of a machine that times depend on, from `Session.machine`."""
    what = session_machine.get("gpu") or session_machine["cpu"]
    return f"{what}, {session_machine['cores']} cores, {session_machine['torch_threads']} threads"


def conditions(device: torch.device) -> dict[str, Any]:
    """Now: load average per core, and of a GPU its clocks and how many other processes use it, where readable."""
    found: dict[str, Any] = {"load_per_core": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)}
    if device.type != "cuda":
        return found
    gpu = _smi(device)
    if gpu is None:
        return found
    found |= {name: value for name, places in _WHERE.items() if (value := _first(gpu, places))}
    if (held := gpu.find("processes")) is not None:
        computing = [process for process in held if "C" in (process.findtext("type") or "")]
        # This process is one of them, under a number of the host's where it runs in a container.
        found["other_gpu_processes"] = max(len(computing) - 1, 0)
    return found


def _first(gpu: Element, places: Sequence[str]) -> str | None:
    """The first value that is a number, without its unit."""
    said = [(gpu.findtext(place) or "").split() for place in places]
    return next((words[0] for words in said if words and words[0][0].isdecimal()), None)


def _smi(device: torch.device) -> Element | None:
    """All that nvidia-smi says of a GPU in one call, which takes up to a second. None where it cannot be asked."""
    # By its own name: CUDA_VISIBLE_DEVICES numbers GPUs anew, and nvidia-smi does not ask it.
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        done = subprocess.run(
            ["nvidia-smi", "-q", "-x", "-i", name], capture_output=True, text=True, check=True, timeout=10
        )
        return ElementTree.fromstring(done.stdout).find("gpu")
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError):
        return None


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
