"""Plans of several methods at several contexts: made in one go, compared with full attention, shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evals.tables.table import Table, number, tokens
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.method import Method
from shadowkv.methods.full.method import Full
from shadowkv.methods.shadowkv.method import ShadowKV
from shadowkv.methods.shadowkv.settings import HIT_RATE
from shadowkv.models.model_size import ModelSize
from shadowkv.planning.gpus import GPU
from shadowkv.planning.planner import Demand, Plan, demand_of, plan
from shadowkv.planning.published import published_demand

_AS_PUBLISHED = " (as published)"


@dataclass(frozen=True)
class Setup:
    """What every plan of a command has in common; None is no limit, and for `batch` the largest that fits."""

    name: str  # of the model
    model: ModelSize
    gpu: GPU
    batch: int | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    as_published: bool = False  # ShadowKV by its authors' engine instead of ours

    def plan(self, method: Method, context: int, batch: int | None) -> Plan:
        """One method at one context."""
        make = _published if self.as_published else demand_of
        demand = make(method, self.model.dims, context)
        limits = {"device_bytes": self.device_bytes, "host_bytes": self.host_bytes}
        return plan(demand, self.model, self.gpu, context, batch=batch, **limits)


class Planned(NamedTuple):
    """A plan, and how many times the tokens/s of full attention at its own largest batch."""

    plan: Plan
    gain: float | None

    @property
    def published(self) -> bool:
        """Whether it is of an engine that is not ours."""
        return self.plan.method.endswith(_AS_PUBLISHED)


def plan_all(setup: Setup, contexts: Sequence[int], methods: Sequence[Method]) -> list[Planned]:
    """Every method at the first context, then at the next one."""
    made = []
    for context in contexts:
        full = setup.plan(Full(), context, None).tokens_per_s
        for method in methods:
            planned = setup.plan(method, context, setup.batch)
            gain = None if full is None or planned.tokens_per_s is None else planned.tokens_per_s / full
            made.append(Planned(planned, gain))
    return made


def _published(method: Method, dims: Dims, context: int) -> Demand:
    inner = method.core
    if not isinstance(inner, ShadowKV):
        return demand_of(method, dims, context)
    return published_demand(inner, dims, context)._replace(label=method.label + _AS_PUBLISHED)


def as_json(planned: Plan) -> dict[str, Any]:
    """What `skv plan --json` says of it."""
    return {
        "method": planned.method,
        "context": planned.context,
        "max_batch": planned.max_batch,
        "device_bytes": planned.device_bytes,
        "host_bytes": planned.host_bytes,
        "floor_ms": planned.floor_ms,
        "chained_floor_ms": planned.chained_ms,
        "step_ms": planned.step_ms,
        "tokens_per_s": planned.tokens_per_s,
        "bound_by": planned.bound_by,
    }


class _Column(NamedTuple):
    head: str
    cell: Callable[[Planned], str]
    dense: bool = True  # shown where space is scarce, too


def _ms(resource: str) -> Callable[[Planned], str]:
    return lambda row: number(None if row.plan.times is None else getattr(row.plan.times, resource), ".1f")


_COLUMNS = (
    _Column("method", lambda row: row.plan.method),
    _Column("context", lambda row: tokens(row.plan.context)),
    _Column("largest\nbatch", lambda row: str(row.plan.max_batch)),
    _Column("limited by", lambda row: row.plan.limited_by, dense=False),
    _Column("batch", lambda row: str(row.plan.batch)),
    _Column("device\nGiB", lambda row: _gib(row.plan.device_bytes)),
    _Column("host\nGiB", lambda row: _gib(row.plan.host_bytes)),
    _Column("HBM\nms", _ms("hbm"), dense=False),
    _Column("PCIe\nms", _ms("pcie"), dense=False),
    _Column("FLOP\nms", _ms("flop"), dense=False),
    _Column("overhead\nms", _ms("overhead"), dense=False),
    _Column("chained\nms", lambda row: number(row.plan.chained_ms, ".1f"), dense=False),
    _Column("step\nms", lambda row: number(row.plan.step_ms, ".1f")),
    _Column("bound by", lambda row: row.plan.bound_by if row.plan.times else "does not fit"),
    _Column("tokens/s", lambda row: number(row.plan.tokens_per_s, ".1f")),
    _Column("gain", lambda row: "–" if row.gain is None else f"{row.gain:.2f}x"),
)


def plan_table(setup: Setup, rows: Sequence[Planned], *, dense: bool = False) -> Table:
    """One line per method and context; the dense one has fewer columns, for a narrow terminal."""
    shown = [column for column in _COLUMNS if column.dense or not dense]
    lines = [[column.cell(row) for column in shown] for row in rows]
    title = f"predicted decoding of {setup.name} on {setup.gpu.name}"
    return Table(title, [column.head for column in shown], lines, _assumptions(setup, rows), names=1)


def parts_table(setup: Setup, rows: Sequence[Planned]) -> Table:
    """Bytes of one sequence by part, one column per context."""
    contexts = list(dict.fromkeys(row.plan.context for row in rows))
    held: dict[tuple[str, str, str], dict[int, int]] = {}
    for planned, _ in rows:
        for part, size in planned.parts.items():
            for place, amount in zip(Bytes._fields, size, strict=True):
                held.setdefault((planned.method, part, place), {})[planned.context] = amount
    lines = [
        [*names, *(number(by_context[context] / 2**20, ".1f") for context in contexts)]
        for names, by_context in held.items()
        if any(by_context.values())
    ]
    caption = (
        f"MiB of one sequence. Weights, once for all: {_gib(setup.model.weight_bytes)} GiB. Workspace: what a step "
        "makes for one layer, and logits."
    )
    columns = ["method", "part", "on", *(f"{tokens(context)}" for context in contexts)]
    return Table("memory by part", columns, lines, caption, names=3)


def write_plot(path: Path, setup: Setup, rows: Sequence[Planned]) -> Path:
    """Predicted tokens/s and batch over the context, one line per method; what does not fit is not there."""
    from evals.tables.looks import looks
    from evals.tables.plots import new_figure, save

    figure = new_figure(8.4, 3.8, f"Predicted, nothing was run: {setup.name} on {setup.gpu.name}")
    speed, size = figure.subplots(1, 2)
    fitting = sorted((row.plan for row in rows if row.plan.times), key=lambda planned: planned.context)
    for label, look in looks([row.plan.method for row in rows]).items():
        found = [planned for planned in fitting if planned.method == label]
        x = [planned.context for planned in found]
        speed.plot(x, [planned.tokens_per_s for planned in found], label=label, ms=4, lw=1.2, **look.style)
        size.plot(x, [planned.batch for planned in found], ms=4, lw=1.2, **look.style)
    contexts = sorted({row.plan.context for row in rows})
    for axis, name in ((speed, "tokens/s"), (size, "batch")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log" if fitting else "linear")  # without a number there is no logarithm to draw
        axis.set_xticks(contexts, [tokens(context) for context in contexts])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("context, tokens", fontsize=8)
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.legend(fontsize=6, loc="outside right center")
    return save(figure, path)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _assumptions(setup: Setup, rows: Sequence[Planned]) -> str:
    gpu, rates = setup.gpu, setup.gpu.achieved
    usable = gpu.usable_bytes if setup.device_bytes is None else min(gpu.usable_bytes, setup.device_bytes)
    host = "unlimited (--host-memory)" if setup.host_bytes is None else f"{_gib(setup.host_bytes)} GiB"
    said = [
        "A prediction: nothing was run.",
        f"{_gib(usable)} GiB usable on the device, host memory {host}.",
        f"Rates reached: {rates.bandwidth_bytes / 1e9:.0f} GB/s memory, {rates.link_bytes / 1e9:.1f} GB/s PCIe, "
        f"{rates.flop / 1e12:.0f} TFLOP/s, {gpu.layer_overhead_ms:g} ms per layer to launch ({gpu.source}).",
        "A step takes as long as its slowest resource or, where it waits for the host in every layer, their sum. Each "
        "byte counts once: kernels that copy in between take longer.",
    ]
    if any(row.plan.chained_ms is not None for row in rows):
        said.append(
            "Chained: what a step cannot go below while all rows are in the same layer, because it chooses before it "
            "fetches and fetches before it attends; the larger of HBM and PCIe is less."
        )
    if setup.as_published:
        said.append(
            f"ShadowKV as published: {HIT_RATE:.0%} of the chunks still there from the step before, rebuilding behind "
            "the fetch."
        )
    elif any(row.plan.method.startswith(ShadowKV.name) for row in rows):
        said.append(
            f"ShadowKV is this repository's: on a GPU {HIT_RATE:.0%} of the chunks are taken to be there from the step "
            "before, as its authors report; --as-published plans their engine."
        )
    if setup.model.dims.element_bytes > 2:
        said.append("FLOP/s are those of 16 bits.")
    if any(row.plan.max_batch == 0 for row in rows):
        said.append("Largest batch 0: not one sequence fits, and the bytes are those of one.")
    said.append("Gain: over full attention at its own largest batch. Prefill is not in it.")
    return " ".join(said)
