"""What a needle test shows: a heat map of depth against length for every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evals.plots import new_figure, save, wrapped, write_score_by_group
from evals.results import Record
from evals.statistics import mean_of_means
from evals.summary import grouped, methods_of, scores_of
from evals.tables import Table, number, tokens


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
    width = 1.4 + len(labels) * (0.7 + 0.55 * max(len(lengths), 3))
    figure = new_figure(width, 1.6 + 0.32 * max(len(depths), 4), title)
    axes = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    images = []
    for axis, label in zip(axes, labels, strict=True):
        grid = _grid([r for r in records if r.method == label], depths, lengths)
        axis.set_facecolor("0.8")
        axis.patch.set(hatch="////", edgecolor="0.6")
        images.append(axis.imshow(np.ma.masked_invalid(grid), cmap="cividis", vmin=0, vmax=1, aspect="auto"))
        for (y, x), value in np.ndenumerate(grid):
            if not np.isnan(value):
                # Dark text on the light end of the map and the other way round, so that print stays readable.
                axis.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color="w" if value < 0.6 else "k")
        axis.set_title(wrapped(label), fontsize=8)
        axis.set_xticks(range(len(lengths)), [tokens(n) for n in lengths], fontsize=7)
        axis.set_xlabel("context length, tokens", fontsize=7)
    axes[0].set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
    axes[0].set_ylabel("needle depth, %", fontsize=8)
    bar = figure.colorbar(images[0], ax=list(axes), label="score")
    bar.ax.tick_params(labelsize=7)
    made = [save(figure, folder / "heatmap.png")]
    turns = sorted({r.meta["turn"] for r in records if "turn" in r.meta})
    if turns:
        groups = [(str(turn), [r for r in records if r.meta["turn"] == turn]) for turn in turns]
        made.append(write_score_by_group(folder / "score_by_turn.png", groups, title, "turn"))
    return made


def _grid(records: Sequence[Record], depths: list[float], lengths: list[int]) -> np.ndarray:
    grid = np.full((len(depths), len(lengths)), np.nan)
    for y, depth in enumerate(depths):
        for x, length in enumerate(lengths):
            known = scores_of([r for r in records if r.length == length and float(r.meta["depth"]) == depth])
            if known:
                grid[y, x] = np.mean(known)
    return grid
