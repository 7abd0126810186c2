"""Fidelity drawn: KL and agreement by position, a heat map of positions and methods, KL against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, NullFormatter

from evals.common.grouping import grouped
from evals.fidelity.summary import FidelityRow, binned, by_position
from evals.runs.forced.record import ForcedRecord
from evals.tables.curves import curves
from evals.tables.looks import looks
from evals.tables.plots import new_figure, save
from evals.tables.summary import is_reference
from evals.tables.table import tokens

_BINS = 16
_ROUNDING = 1e-6  # nats: what is below loses nothing, and would stretch a logarithmic scale


def write_fidelity_plots(
    folder: Path, records: Sequence[ForcedRecord], rows: Sequence[FidelityRow], title: str
) -> list[Path]:
    """All that there is something to draw for; of the longest prompts where it is of one length."""
    good = [record for record in records if record.final and record.kl]
    if not any(record.mean_kl > _ROUNDING for record in good):
        return []
    longest = max(record.length for record in good)
    at = grouped([record for record in good if record.length == longest], lambda r: r.method)
    headed = f"{title} · {tokens(longest)}"
    made = [_curves(folder / "by_position.png", at, headed)]
    if len(at) > 1:
        made.append(_heat_map(folder / "heatmap.png", at, headed))
    if any((row.kl or 0) > _ROUNDING and row.device_bytes for row in rows if row.length == longest):
        made.append(_by_bytes(folder / "kl_by_bytes.png", [row for row in rows if row.length == longest], headed))
    return made


def _curves(path: Path, at: dict[str, list[ForcedRecord]], title: str) -> Path:
    figure = new_figure(9.6, 4.0, title)
    axes = figure.subplots(1, 2)
    for label, look in looks(list(at)).items():
        kl, same = (by_position(at[label], values) for values in (lambda r: r.kl, lambda r: r.top1))
        for axis, values in zip(axes, (binned(kl, _BINS), binned(same, _BINS)), strict=True):
            if axis is axes[1] or float(np.mean(values)) > _ROUNDING:
                places = (np.arange(len(values)) + 0.5) * len(kl) / len(values)
                axis.plot(places, values, lw=1, ms=3, label=label, **look.style)
    axes[0].set_yscale("log")
    _plain(axes[0].yaxis)
    for axis, name in zip(axes, ("KL(full || method), nats", "share with the same most likely token"), strict=True):
        axis.set_xlabel("token fed after the prompt", fontsize=8)
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=6, loc="outside right center")
    return save(figure, path)


def _heat_map(path: Path, at: dict[str, list[ForcedRecord]], title: str) -> Path:
    """Methods from the nearest to the farthest."""
    means = {label: by_position(found, lambda r: r.kl) for label, found in at.items()}
    order = sorted(means, key=lambda label: float(np.mean(means[label])))
    columns = min(_BINS, max(map(len, means.values())))
    grid = np.full((len(order), columns), np.nan)
    for row, label in enumerate(order):
        values = binned(means[label], columns)
        grid[row, : len(values)] = values
    least = min(float(np.nanmin(row)) for row in grid if np.nanmean(row) > _ROUNDING)
    figure = new_figure(7.6, 1.2 + 0.19 * len(order), title)
    axis = figure.subplots()
    norm = LogNorm(vmin=max(least, _ROUNDING))
    image = axis.imshow(np.ma.masked_invalid(grid.clip(min=_ROUNDING)), cmap="cividis", norm=norm, aspect="auto")
    axis.set_yticks(range(len(order)), order, fontsize=7)
    longest = max(map(len, means.values()))
    shown = range(0, columns, max(1, columns // 8))
    axis.set_xticks(list(shown), [str(1 + round(place * longest / columns)) for place in shown], fontsize=7)
    axis.set_xlabel("token fed after the prompt", fontsize=8)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label("KL(full || method), nats", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _plain(bar.ax.yaxis)
    return save(figure, path)


def _plain(axis: Any) -> None:
    """Numbers at the ticks of a logarithmic axis, no formulas."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _by_bytes(path: Path, rows: Sequence[FidelityRow], title: str) -> Path:
    """One point per setting that loses anything; settings that differ in one size only are joined."""
    known = {row.method: row for row in rows if (row.kl or 0) > _ROUNDING and row.device_bytes}
    lines = {name: [known[label] for label in joined] for name, joined in curves(list(known)).items()}
    figure = new_figure(6.2, 3.9, title)
    axis = figure.subplots()
    for name, look in looks(list(lines)).items():
        found = sorted(lines[name], key=lambda row: row.device_bytes or 0.0)
        x = [(row.device_bytes or 0.0) / (row.prompt_tokens or 1.0) / 1024 for row in found]
        y = np.array([[row.kl, row.kl_low or row.kl, row.kl_high or row.kl] for row in found], dtype=float)
        mean, low, high = np.maximum(y, _ROUNDING).T
        axis.errorbar(x, mean, np.stack((mean - low, high - mean)).clip(min=0), label=name, ms=5, lw=0.8,
                      elinewidth=0.5, capsize=2, **look.style)  # fmt: skip
    for full in (row for row in rows if is_reference(row.method) and row.device_bytes):
        axis.axvline((full.device_bytes or 0.0) / (full.prompt_tokens or 1.0) / 1024, color="0.6", lw=0.8, ls="--")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    _plain(axis.yaxis)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("KV bytes on the device per prompt token, KiB (dashed: full attention's)", fontsize=8)
    axis.set_ylabel("KL(full || method), nats per token", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=6, loc="outside right center")
    return save(figure, path)
