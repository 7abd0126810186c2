"""What a needle test shows: a heat map of depth against length for every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evals.common.grouping import grouped
from evals.runs.results import Record
from evals.tables.plots import new_figure, save, wrapped, write_score_by_group
from evals.tables.statistics import mean_of_means
from evals.tables.summary import methods_of, scores_of
from evals.tables.table import Table, number, tokens

_WIDTH = 8.4  # inches of panels side by side
# On a coloured cell, so not turned where a page turns greys for a dark background.
_ON_DARK, _ON_LIGHT = "#fffffe", "#000001"


def niah_tables(records: Sequence[Record]) -> list[Table]:
    """Score by turn, if there are several; the summary by method and length says the rest."""
    turns = sorted({r.meta["turn"] for r in records if "turn" in r.meta})
    if not turns:
        return []
    cells = grouped(records, lambda r: (r.method, r.length, r.meta["turn"]))
    lines = []
    for label in methods_of(records):
        for length in sorted({r.length for r in records}):
            by_turn = [scores_of(cells.get((label, length, turn), [])) for turn in turns]
            lines.append([label, tokens(length), *(number(mean_of_means([scores]), ".2f") for scores in by_turn)])
    caption = "Turn 1 is asked first; all turns go on in the same cache, which also holds the answers so far."
    return [Table("Score by turn", ["method", "length", *map(str, turns)], lines, caption, names=2)]


def write_niah_plots(folder: Path, records: Sequence[Record], title: str) -> list[Path]:
    """heatmap.png: depth x length per method on one scale from 0 to 1; cells without a scored answer are hatched."""
    labels = methods_of(records)
    lengths = sorted({r.length for r in records})
    depths = sorted({float(r.meta["depth"]) for r in records})
    wide = 0.5 + 0.4 * max(len(lengths), 2)
    across = min(len(labels), int(_WIDTH / wide))
    down = -(-len(labels) // across)
    figure = new_figure(1.4 + across * wide, 0.5 + down * (0.8 + 0.2 * max(len(depths), 4)), title)
    grid_of_axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    axes = list(grid_of_axes.flat)
    for axis in axes[len(labels) :]:
        axis.set_visible(False)
    images = []
    for axis, label in zip(axes, labels, strict=False):
        grid = _grid([r for r in records if r.method == label], depths, lengths)
        axis.set_facecolor("0.8")
        axis.patch.set(hatch="////", edgecolor="0.6")
        images.append(axis.imshow(np.ma.masked_invalid(grid), cmap="cividis", vmin=0, vmax=1, aspect="auto"))
        for (y, x), value in np.ndenumerate(grid):
            if not np.isnan(value):
                # Dark text on the light end of the map and the other way round, so that print stays readable.
                ink = _ON_DARK if value < 0.6 else _ON_LIGHT
                axis.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=ink)
        axis.set_title(wrapped(label), fontsize=7)
        axis.set_xticks(range(len(lengths)), [tokens(n) for n in lengths])
        axis.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    figure.supxlabel("context length, tokens", fontsize=8)
    figure.supylabel("needle depth, %", fontsize=8)
    bar = figure.colorbar(images[0], ax=axes, aspect=30)
    bar.set_label("score", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    made = [save(figure, folder / "heatmap.png")]
    turns = sorted({r.meta["turn"] for r in records if "turn" in r.meta})
    if turns:
        groups = [(str(turn), [r for r in records if r.meta["turn"] == turn]) for turn in turns]
        made.append(write_score_by_group(folder / "score_by_turn.png", groups, title, "turn"))
    return made


def _grid(records: Sequence[Record], depths: list[float], lengths: list[int]) -> np.ndarray:
    grid = np.full((len(depths), len(lengths)), np.nan)
    for (depth, length), found in grouped(records, lambda r: (float(r.meta["depth"]), r.length)).items():
        known = scores_of(found)
        if known:
            grid[depths.index(depth), lengths.index(length)] = np.mean(known)
    return grid
