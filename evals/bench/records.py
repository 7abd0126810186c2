"""One measurement: a method at a context and a batch, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple


class Cell(NamedTuple):
    """What a record measures."""

    method: str
    context: int  # prompt tokens of every row
    batch: int
    repeat: int


@dataclass(frozen=True)
class Measurement:
    """What every record of a measurement says first."""

    method: str
    context: int
    batch: int
    repeat: int
    status: str  # ok, oom or error
    error: str | None
    machine: str
    started: str

    @property
    def key(self) -> Cell:
        return Cell(self.method, self.context, self.batch, self.repeat)

    @property
    def final(self) -> bool:
        """Memory that ran out once would do so again; an error may have been of the moment."""
        return self.status in ("ok", "oom")


@dataclass(frozen=True)
class BenchRecord(Measurement):
    """What one measurement found. Times are those of this process; bytes are of all rows of the batch."""

    FILE: ClassVar[str] = "throughput.jsonl"

    step_ms: list[float] = field(default_factory=list)  # decode steps after the warm-up, each for all rows
    warmup_steps: int = 0
    decoded_before: int = 0  # tokens of each row in earlier repeats of the same build, which this one goes on from
    turns: list[str] | None = None  # methods that took turns in repeats, where not all could stand side by side
    ttft_s: float | None = None  # from a prompt to its first token, the prompt not having to wait for others
    prefill_s: float | None = None  # of all prompts
    build_s: float | None = None  # caches from the prompts' keys and values, those coming back from the host
    streamed_rows: int = 0  # prompts computed straight into a cache, which counts as prefill; TTFT, if all were
    stacked: bool | None = None  # False where the rows' attention runs one after the other
    weights_bytes: int = 0
    kv_device_bytes: int = 0  # after the last step
    kv_host_bytes: int = 0
    peak_device_bytes: int | None = None  # of the allocator, while building and decoding; None on a CPU
    peak_host_bytes: int | None = None  # of the process; None where the system does not tell
    bus_bytes: int = 0  # per step, between host and device, as planned
    read_bytes: int = 0  # per step, of device memory, as planned
    hit_rate: float | None = None  # share of the chunks a step chose that were on the device already, in later steps
    tokens_sha256: str | None = None  # of all rows' tokens
    conditions: dict[str, Any] = field(default_factory=dict)  # load, clocks, other processes

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens of all rows over the time of all steps."""
        return 1000 * self.batch * len(self.step_ms) / sum(self.step_ms) if self.step_ms else None
