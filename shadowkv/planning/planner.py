"""What a model and a method need and how fast they decode on a GPU, before anything runs: bytes first, then a roofline.

A plan is a prediction. What it assumes:
- the prompt has been taken over by the method and its dense prefill is gone; generated tokens are not counted;
- a step reads all weights but an embedding that is not the output matrix, then what each sequence's method reads,
  at the rates that the `GPU` says are achieved. Copies that an implementation makes on the way are not in it;
- a step that fetches nothing from the host takes as long as its slowest resource: kernels are launched ahead of the
  device. One that fetches waits for the host in every layer, so nothing runs ahead and the times add up, but for the
  device work that goes on during the fetch (`Demand.overlapped_bytes`);
- tokens per second are those of one GPU decoding a full batch of sequences of one length, prefill excluded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.method import Method, Stages
from shadowkv.models.model_size import ModelSize
from shadowkv.planning.gpus import GPU
from shadowkv.planning.schedule import chained_floor_ms, work_of

_LOGIT_BYTES = 4  # fp32, beside those of the model's type


class Demand(NamedTuple):
    """What one sequence asks of a machine: memory held, and what one decoded token moves and computes."""

    label: str
    parts: dict[str, Bytes]
    workspace_bytes: int
    read_bytes: int  # of device memory
    bus_bytes: int
    flop: int
    overlapped_bytes: int = 0  # device memory moved while the bus is busy, on top of `read_bytes`
    stages: Stages | None = None  # `read_bytes` by what the fetch waits for, and what waits for it


class Times(NamedTuple):
    """How long each resource is busy in one step, ms."""

    hbm: float
    pcie: float
    flop: float
    overhead: float


@dataclass(frozen=True)
class Plan:
    """One method at one context. Without room for a batch of at least 1, bytes are those of one sequence."""

    method: str
    context: int
    max_batch: int
    batch: int  # what bytes and times are for: the largest, or the one asked for
    limited_by: str  # what keeps the batch from growing: device-memory or host-memory
    weight_bytes: int
    parts: dict[str, Bytes]  # of one sequence, workspace included
    times: Times | None  # None where the batch does not fit
    step_ms: float | None
    tokens_per_s: float | None
    chained_ms: float | None  # floor of a step in which nothing overlaps that depends on each other, where that is told
    bound_by: (
        str  # hbm, pcie, flop or overhead, whichever is busy longest; the memory that is short, if it does not fit
    )

    @property
    def floor_ms(self) -> float | None:
        """What memory or the bus alone takes: the larger one, as if nothing waited for anything."""
        return None if self.times is None else max(self.times.hbm, self.times.pcie)

    @property
    def sequence_bytes(self) -> Bytes:
        """Of one sequence."""
        return sum(self.parts.values(), Bytes(0, 0))

    @property
    def device_bytes(self) -> int:
        """Weights and all sequences of the batch."""
        return self.weight_bytes + max(self.batch, 1) * self.sequence_bytes.device

    @property
    def host_bytes(self) -> int:
        """All sequences of the batch."""
        return max(self.batch, 1) * self.sequence_bytes.host


def demand_of(method: Method, dims: Dims, tokens: int) -> Demand:
    """What `method` asks for in this repository's engine: its own account of itself."""
    return Demand(
        method.label,
        method.memory_parts(dims, tokens),
        method.workspace_bytes(dims, tokens),
        method.read_bytes(dims, tokens),
        method.bus_bytes(dims, tokens),
        method.step_flop(dims, tokens),
        stages=method.stages(dims, tokens),
    )


def plan(
    demand: Demand,
    model: ModelSize,
    gpu: GPU,
    tokens: int,
    *,
    batch: int | None = None,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
) -> Plan:
    """Predict a step after prompts of `tokens` at the largest batch that fits, or at `batch`.

    `device_bytes` caps what the GPU's memory can be used for, `host_bytes` is the host's memory; None is no limit.
    """
    parts = sequence_parts(demand, model, tokens)
    need = sum(parts.values(), Bytes(0, 0))
    room = min(gpu.usable_bytes, gpu.usable_bytes if device_bytes is None else device_bytes) - model.weight_bytes
    on_device = max(room, 0) // need.device
    on_host = on_device if host_bytes is None or not need.host else host_bytes // need.host
    max_batch = min(on_device, on_host)
    limited_by = "host-memory" if on_host < on_device else "device-memory"
    wanted = max_batch if batch is None else batch
    fits = 0 < wanted <= max_batch
    times = _times(demand, model, gpu, tokens, wanted) if fits else None
    step_ms = None if times is None else _step_ms(times, demand, gpu, wanted)
    return Plan(
        method=demand.label,
        context=tokens,
        max_batch=max_batch,
        batch=wanted,
        limited_by=limited_by,
        weight_bytes=model.weight_bytes,
        parts=parts,
        times=times,
        step_ms=step_ms,
        tokens_per_s=None if step_ms is None else 1000 * wanted / step_ms,
        chained_ms=_chained_ms(demand, model, gpu, tokens, wanted) if fits else None,
        bound_by=limited_by if times is None else max(Times._fields, key=lambda name: getattr(times, name)),
    )


def sequence_parts(demand: Demand, model: ModelSize, tokens: int) -> dict[str, Bytes]:
    """Memory of one sequence by part: what the method holds, layers left dense, a step's workspace and logits."""
    dense = model.dense_bytes(tokens)
    logits = model.vocab * (_LOGIT_BYTES + model.dims.element_bytes)
    return {
        **demand.parts,
        **({"layers left dense": Bytes(dense, 0)} if dense else {}),
        "workspace": Bytes(demand.workspace_bytes + logits, 0),
    }


def step_bytes(demand: Demand, model: ModelSize, tokens: int, batch: int) -> int:
    """Device memory that a step of `batch` sequences has to read: weights once, then what each sequence reads."""
    weights = model.step_parameters * model.dims.element_bytes
    return weights + batch * (demand.read_bytes + model.dense_bytes(tokens))


def _times(demand: Demand, model: ModelSize, gpu: GPU, tokens: int, batch: int) -> Times:
    rates, dims = gpu.achieved, model.dims
    moved = step_bytes(demand, model, tokens, batch) + batch * demand.overlapped_bytes
    dense_flop = 2 * model.dense_bytes(tokens) // dims.element_bytes * dims.q_heads // dims.kv_heads
    return Times(
        hbm=1000 * moved / rates.bandwidth_bytes,
        pcie=1000 * batch * demand.bus_bytes / rates.link_bytes,
        flop=1000 * batch * (2 * model.step_parameters + demand.flop + dense_flop) / rates.flop,
        overhead=len(model.layers) * gpu.layer_overhead_ms,
    )


def _chained_ms(demand: Demand, model: ModelSize, gpu: GPU, tokens: int, batch: int) -> float | None:
    if demand.stages is None or not demand.bus_bytes:
        return None
    return chained_floor_ms(work_of(demand.stages, demand.bus_bytes, model, tokens, gpu.achieved), batch)


def _step_ms(times: Times, demand: Demand, gpu: GPU, batch: int) -> float:
    if not demand.bus_bytes:
        return max(times)
    beside_fetch = 1000 * batch * demand.overlapped_bytes / gpu.achieved.bandwidth_bytes
    return max(times.hbm - beside_fetch, times.flop) + max(times.pcie, beside_fetch) + times.overhead
