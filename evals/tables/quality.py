"""Selection quality of a run with --diagnostics: a table over layers, and a plot by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evals.common.grouping import grouped
from evals.runs.results import Record
from evals.tables.looks import looks
from evals.tables.plots import new_figure, save
from evals.tables.table import Table, number, tokens

_MEASURES = {"output_error": "output error |o - o_full| / |o_full|", "recall": "attention mass recalled"}


def quality_tables(records: Sequence[Record]) -> list[Table]:
    """Means over layers and prompts, by method and length; none without diagnostics."""
    found = grouped([r for r in records if "diagnostics" in r.meta], lambda r: (r.method, r.length))
    if not found:
        return []
    lines = []
    for (label, length), cell in found.items():
        error, recall = (_by_layer(cell, measure) for measure in _MEASURES)
        lines.append([label, tokens(length), number(_mean(recall), ".3f"), number(_mean(error), ".3f"), _worst(error)])
    caption = (
        "Each layer on full attention's inputs, over full attention's answer. Recall: share of its attention mass on "
        "the tokens attended to, first step, where a method chooses tokens in each layer by itself. Error: of the "
        "layer's output."
    )
    return [Table("Selection quality", ["method", "length", "recall", "error", "worst layer"], lines, caption, names=2)]


def write_quality_by_layer(path: Path, records: Sequence[Record], title: str) -> Path:
    """Both measures by layer, at the longest length that has them."""
    measured = [r for r in records if "diagnostics" in r.meta]
    longest = max(record.length for record in measured)
    figure = new_figure(9.6, 4.2, f"{title} · {tokens(longest)}")
    axes = figure.subplots(1, 2)
    cells = grouped(measured, lambda r: r.method)
    for axis, (measure, name) in zip(axes, _MEASURES.items(), strict=True):
        for label, look in looks(list(cells)).items():
            values = _by_layer([r for r in cells[label] if r.length == longest], measure)
            if values is not None:
                axis.plot(values, lw=1, ms=3, label=label, **look.style)
        axis.set_xlabel("layer (of those with full attention)", fontsize=8)
        axis.set_ylabel(name, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=6, loc="outside right center")
    return save(figure, path)


def _by_layer(records: Sequence[Record], measure: str) -> list[float] | None:
    """Mean over records for each layer, None where nothing was measured."""
    found = [record.meta["diagnostics"][measure] for record in records]
    found = [layers for layers in found if None not in layers]
    return [float(x) for x in np.mean(found, axis=0)] if found else None


def _mean(layers: list[float] | None) -> float | None:
    return None if layers is None else float(np.mean(layers))


def _worst(errors: list[float] | None) -> str:
    return "–" if errors is None else f"{int(np.argmax(errors))} ({max(errors):.2f})"
