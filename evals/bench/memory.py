"""Memory before, while and after something is measured: what it will take, what is there, what it took."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shadowkv.common.dims import Bytes
from shadowkv.contract.method import Method
from shadowkv.models.model_size import ModelSize, streamed_bytes
from shadowkv.planning.planner import demand_of, sequence_parts
from shadowkv.tensors.host_memory import HOST_RESERVE, available_host_bytes

_GROWTH_TOKENS = 256  # room that buffers make for new tokens at a time


class MemoryShortError(MemoryError):
    """Memory that would run out: said before anything is allocated."""


def size(count: float) -> str:
    """Bytes for a sentence."""
    if count < 2**30:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**30:.2f} GiB" if count < 100 * 2**30 else f"{count / 2**30:.0f} GiB"


@dataclass(frozen=True)
class Room:
    """The memory that a measurement may take. `cap_bytes` is of the device; None is all there is."""

    device: torch.device
    model: ModelSize
    cap_bytes: int | None = None
    computes_prompts: bool = True
    records_queries: bool = False

    def need(self, method: Method, context: int, batch: int, new_tokens: int) -> Bytes:
        """What `batch` prompts take with the model: what `skv plan` says, room to grow, and one more on its way."""
        dims = self.model.dims
        one = sum(sequence_parts(demand_of(method, dims, context), self.model, context).values(), Bytes(0, 0))
        growth = (new_tokens + _GROWTH_TOKENS) * dims.full_bytes_per_token
        prompt = 0
        if self.computes_prompts:
            prompt = streamed_bytes(dims, self.model.hidden, context, with_queries=self.records_queries)
        return Bytes(self.model.weight_bytes + batch * (one.device + growth) + prompt, batch * one.host)

    def check(self, method: Method, context: int, batch: int, new_tokens: int) -> None:
        """Raise `MemoryShortError` where the plan exceeds the cap of a CPU, or the host memory that is free now.

        A GPU's own allocator holds its cap (see `hold_cap`).
        """
        need = self.need(method, context, batch, new_tokens)
        if self.device.type == "cpu" and self.cap_bytes is not None and need.device > self.cap_bytes:
            raise MemoryShortError(
                f"needs {size(need.device)} of device memory as planned, the cap is {size(self.cap_bytes)}"
            )
        self.check_host(method, context, batch, new_tokens)

    def host_need(self, method: Method, context: int, batch: int, new_tokens: int) -> int:
        """Of what `need` says, bytes that the host has to have free."""
        need = self.need(method, context, batch, new_tokens)
        # On a CPU the device's share is taken from the host too; the weights are there already.
        return need.host + (need.device - self.model.weight_bytes if self.device.type == "cpu" else 0)

    def check_host(self, method: Method, context: int, batch: int, new_tokens: int) -> None:
        """Raise `MemoryShortError` where the plan exceeds the host memory that is free now."""
        host, free = self.host_need(method, context, batch, new_tokens), available_host_bytes()
        if host > (1 - HOST_RESERVE) * free:
            raise MemoryShortError(
                f"needs {size(host)} of host memory, {size(free)} are available: nothing was allocated"
            )

    def largest_batch(self, method: Method, context: int, new_tokens: int, ceiling: int) -> int:
        """The largest batch that should fit, 0 for none: where a search may start."""
        empty, one = (self.need(method, context, batch, new_tokens) for batch in (0, 1))
        device, host = one.device - empty.device, one.host
        limits = [(self.device_bytes() - empty.device) // max(device, 1)]
        free = int((1 - HOST_RESERVE) * available_host_bytes())
        if self.device.type == "cpu":
            limits.append((free - empty.device + self.model.weight_bytes) // max(device + host, 1))
        elif host:
            limits.append(free // host)
        return max(0, min(ceiling, *limits))

    def fits_together(self, methods: Sequence[Method], context: int, batch: int, new_tokens: int) -> bool:
        """Whether a batch of each is planned to stand beside those of the others, with a little to spare."""
        needs = [self.need(method, context, batch, new_tokens) for method in methods]
        weights = self.model.weight_bytes
        device = weights + sum(need.device - weights for need in needs)
        host = sum(need.host for need in needs) + (device - weights if self.device.type == "cpu" else 0)
        return (
            device <= (1 - HOST_RESERVE) * self.device_bytes() and host <= (1 - HOST_RESERVE) * available_host_bytes()
        )

    def device_bytes(self) -> int:
        """The size of the device, or the cap on it."""
        if self.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.device)[1]
        else:
            total = available_host_bytes() + self.model.weight_bytes
        return total if self.cap_bytes is None else min(total, self.cap_bytes)

    def hold_cap(self) -> None:
        """Make a GPU's allocator refuse what exceeds the cap."""
        if self.device.type == "cuda" and self.cap_bytes is not None:
            total = torch.cuda.mem_get_info(self.device)[1]
            # By its number, or None for the current one: this function alone refuses a device that names no number.
            torch.cuda.set_per_process_memory_fraction(min(self.cap_bytes / total, 1.0), self.device.index)


def release(device: torch.device) -> None:
    """Give back what nothing uses any more, and start counting peaks anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the process's peak begins at what it holds now
    except OSError:
        return  # not Linux, or not allowed: the peak stays the process's own


def peak_bytes(device: torch.device) -> tuple[int | None, int | None]:
    """Most bytes held since `release`, on the device (None on a CPU) and by the process (None where not told)."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        on_host = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        on_host = None
    return on_device, on_host
