"""Tables and stacked bars of where a decode step's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evals.bench.conditions import noise_note
from evals.bench.latency.profile import PARTS, LatencyRecord
from evals.common.grouping import grouped
from evals.runs.manifest import Manifest
from evals.tables.looks import COLOURS
from evals.tables.plots import new_figure, save, wrapped
from evals.tables.table import Table, number, tokens

_NAMES = {"fetch": "value fetch", "rebuild": "key rebuild", "mlp": "MLP", "head": "LM head"}
_CAPTION = (
    "ms per step, mean over profiled steps; parts of the time of {clock}. Selection: which tokens to read. Fetch: "
    "gathering what was selected. Rebuild: keys from factors or codes, with their RoPE. Other: norms, RoPE of new "
    "tokens, embeddings, the interpreter. Plain: the median step without a profiler, which slows a step down by as "
    "much as stated."
)


def latency_table(title: str, records: Sequence[LatencyRecord]) -> Table:
    """One line per method, context and batch, one column per part."""
    clocks = {record.clock for record in records if record.status == "ok"} or {"cpu"}
    waiting = any(record.waiting_ms is not None for record in records)
    columns = ["context", "method", "batch", *(_NAMES.get(part, part).replace(" ", "\n") for part in PARTS)]
    columns += [*(["waiting"] if waiting else []), "step", "plain", "slowed"]
    lines = []
    for r in records:
        cells = [tokens(r.context), r.method, str(r.batch) if r.status == "ok" else f"{r.batch} {r.status.upper()}"]
        cells += [number(r.parts_ms.get(part), ".2f") for part in PARTS]
        cells += [number(r.waiting_ms, ".2f")] if waiting else []
        slowed = "–" if r.slowed is None else f"{100 * r.slowed:.0f}%"
        lines.append([*cells, number(r.profiled_ms, ".2f"), number(r.plain_ms, ".2f"), slowed])
    clock = " and ".join({"cpu": "the CPU", "device": "the GPU's kernels"}[clock] for clock in sorted(clocks))
    return Table(title, columns, lines, _CAPTION.format(clock=clock), names=2)


def latency_notes(manifest: Manifest, records: Sequence[LatencyRecord]) -> list[str]:
    """What every table of this profile must say."""
    machines = list(dict.fromkeys(record.machine for record in records))
    several = [f"measured on several machines: {'; '.join(machines)}"] if len(machines) > 1 else []
    failed = [
        f"{r.status}: {r.method} @ {tokens(r.context)} x {r.batch}: {r.error}" for r in records if r.status != "ok"
    ]
    before = [record.conditions["before"] for record in records if "before" in record.conditions]
    warm = f"warm: {manifest.config.get('warmup_steps', '?')} steps before those that count"
    on_gpu = str(manifest.model["device"]).startswith("cuda")
    launched = ["steps are launched part by part; skv bench throughput runs them as one CUDA graph"] if on_gpu else []
    return [*manifest.notes, *launched, *several, *failed, f"{warm}; noise before each: {noise_note(before)}"]


def write_latency_bars(path: Path, records: Sequence[LatencyRecord], title: str) -> Path:
    """A bar per method, stacked by part, a panel per context and batch."""
    panels = grouped(records, lambda r: (r.context, r.batch))
    most = max(map(len, panels.values()))
    figure = new_figure(max(5.2, 1.8 + 0.9 * most * len(panels)), 4.2, title)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    parts = [*PARTS, *(["waiting"] if any(r.waiting_ms is not None for r in records) else [])]
    for axis, ((context, batch), cells) in zip(axes, panels.items(), strict=True):
        bottom = np.zeros(len(cells))
        for place, part in enumerate(parts):
            height = np.array([{**r.parts_ms, "waiting": r.waiting_ms or 0.0}.get(part, 0.0) for r in cells])
            # Colours repeat after eight, and hatches tell those apart.
            colour, hatch = COLOURS[place % len(COLOURS)], "///" if place >= len(COLOURS) else None
            axis.bar(range(len(cells)), height, bottom=bottom, color=colour, hatch=hatch, edgecolor="white", lw=0.3,
                     label=_NAMES.get(part, part))  # fmt: skip
            bottom += height
        axis.set_xticks(range(len(cells)), [wrapped(r.method) for r in cells], fontsize=6)
        axis.set_title(f"{tokens(context)} x {batch}", fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("ms per decode step, profiled", fontsize=8)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], fontsize=6, loc="outside right center")
    return save(figure, path)
