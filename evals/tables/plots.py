"""Plots that several benchmarks share, drawn without any global plotting state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from evals.common.grouping import grouped
from evals.runs.results import Record
from evals.tables.curves import curves
from evals.tables.looks import looks
from evals.tables.statistics import interval_95, mean_of_means
from evals.tables.summary import Row, is_reference, methods_of, scores_of
from evals.tables.table import tokens

_DPI = 200
# Text stays text in an SVG, in whatever sans serif the reader has; ids do not change from one drawing to the next.
_SVG = {"svg.fonttype": "none", "svg.hashsalt": "skv", "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"]}


def new_figure(width: float, height: float, title: str) -> Figure:
    """A figure of that many inches, with a canvas of its own."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG and, beside it, as an SVG, into a folder that may be missing; return the PNG's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for axis in figure.axes:
        tidy(axis)
    for legend in figure.findobj(Legend):
        legend.set_frame_on(False)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a `$` in a label is no formula
    figure.savefig(path, dpi=_DPI)
    with matplotlib.rc_context(_SVG):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return path


def tidy(axis: Any) -> None:
    """Only the two lines that carry numbers, and those in grey."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("0.7")
    axis.tick_params(color="0.7")
    axis.set_axisbelow(True)


def wrapped(label: str) -> str:
    """A method's label over several lines."""
    return label.replace(":", "\n").replace(",", "\n")


def write_score_by_group(
    path: Path, groups: Sequence[tuple[str, Sequence[Record]]], title: str, axis_label: str
) -> Path:
    """Score in percent per group (length, bucket) and method, with 95 % bootstrap intervals over samples."""
    figure = new_figure(5.8, 3.8, title)
    axis = figure.subplots()
    labels = methods_of([record for _, records in groups for record in records])
    for place, (label, look) in enumerate(looks(labels).items()):
        # Intervals of several methods at one place would hide each other.
        shift = 0.04 * (place - (len(labels) - 1) / 2)
        points = [(x + shift, *_score([r for r in found if r.method == label])) for x, (_, found) in enumerate(groups)]
        known = np.array([point for point in points if point[1] is not None], dtype=float)
        if not len(known):
            continue
        x, y, low, high = known.T
        drawn = axis.errorbar(x, y, _whiskers(y, low, high), label=label, capsize=2, lw=1.2, ms=4,
                              elinewidth=0.8, **look.style)  # fmt: skip
        drawn.lines[0].set_clip_on(False)  # a marker at 0 is seen whole
    axis.set_xticks(range(len(groups)), [name for name, _ in groups])
    axis.set_xlabel(axis_label, fontsize=8)
    _finish(figure, axis)
    return save(figure, path)


def write_score_by_bytes(path: Path, rows: Sequence[Row], title: str) -> Path:
    """Score against device KV bytes per prompt token at the longest length, one point per setting of a method.

    Settings that differ in one size only are joined; whiskers are 95 % bootstrap intervals over samples.
    """
    longest = max(row.length for row in rows)
    known = {row.method: row for row in rows if row.length == longest and row.score is not None and row.device_bytes}
    points = {name: [known[label] for label in joined] for name, joined in curves(list(known)).items()}
    figure = new_figure(6.2, 3.9, title)
    axis = figure.subplots()
    for name, look in looks(list(points)).items():
        found = points[name]
        found.sort(key=lambda row: (row.device_bytes or 0.0, row.score or 0.0))
        x = [(row.device_bytes or 0.0) / (row.prompt_tokens or 1.0) / 1024 for row in found]
        scores = 100 * np.array([[row.score, row.score_low, row.score_high] for row in found], dtype=float)
        y, low, high = scores.T
        axis.errorbar(x, y, _whiskers(y, low, high), label=name, ms=5, lw=0.8, elinewidth=0.5, capsize=2,
                      **look.style)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel(f"KV bytes on the device per prompt token, KiB (length {tokens(longest)})", fontsize=8)
    _finish(figure, axis)
    axis.set_ylim(-4, 104)  # a marker at 0 or 100 is seen whole
    return save(figure, path)


def write_score_dots(path: Path, rows: Sequence[Row], title: str) -> Path:
    """Score in percent of every method, best first, with 95 % bootstrap intervals over samples; one length."""
    known = sorted((row for row in rows if row.score is not None), key=lambda row: row.score or 0.0)
    figure = new_figure(5.8, 1.1 + 0.18 * len(known), title)
    axis = figure.subplots()
    scores = 100 * np.array([[row.score, row.score_low, row.score_high] for row in known], dtype=float)
    mean, low, high = scores.T
    full = [place for place, row in enumerate(known) if is_reference(row.method)]
    spread, drawn = _whiskers(mean, low, high), looks([row.method for row in rows])
    for place, row in enumerate(known):
        axis.errorbar(mean[place], place, xerr=spread[:, place, None], ms=4, lw=1, **drawn[row.method].style)
    for place in full:
        axis.axvline(mean[place], color="0.6", lw=0.8, ls="--")
    axis.set_yticks(range(len(known)), [row.method for row in known], fontsize=7)
    axis.set_ylim(-0.7, len(known) - 0.3)
    axis.set_xlim(-2, 102)
    axis.set_xlabel(f"score, % (length {tokens(rows[0].length)}; dashed: full attention)", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(axis="x", alpha=0.3)
    return save(figure, path)


def write_score_by_length(path: Path, records: Sequence[Record], title: str) -> Path:
    """`write_score_by_group` over prompt lengths."""
    by_length = sorted(grouped(records, lambda r: r.length).items())
    return write_score_by_group(path, [(tokens(length), found) for length, found in by_length], title, "length, tokens")


def write_task_bars(path: Path, records: Sequence[Record], title: str, tasks: Sequence[str]) -> Path:
    """Score in percent per task and method, with 95 % bootstrap intervals over samples."""
    labels = methods_of(records)
    figure = new_figure(max(6.4, 1.5 + 0.12 * len(tasks) * (len(labels) + 1.5)), 4.2, title)
    axis = figure.subplots()
    width = 0.8 / len(labels)
    for place, (label, look) in enumerate(looks(labels).items()):
        cells = [_score([r for r in records if r.method == label and r.task == task]) for task in tasks]
        y, low, high = np.array(cells, dtype=float).T
        x = np.arange(len(tasks)) + (place - (len(labels) - 1) / 2) * width
        axis.bar(x, y, width, yerr=_whiskers(y, low, high), label=label, color=look.colour, hatch=look.hatch,
                 edgecolor="white", lw=0, ecolor="0.5", error_kw={"lw": 0.9})  # fmt: skip
        for at in x[np.isnan(y)]:
            axis.text(at, 1, "–", ha="center", fontsize=7, color=look.colour)  # without a score is not a score of 0
    axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    _finish(figure, axis)
    return save(figure, path)


def _score(records: Sequence[Record]) -> tuple[float | None, float | None, float | None]:
    """Mean over tasks in percent, and its interval."""
    tasks = [scores_of(found) for found in grouped(records, lambda r: r.task).values()]
    mean, spread = mean_of_means(tasks), interval_95(tasks)
    if mean is None:
        return None, None, None
    low, high = spread or (mean, mean)
    return 100 * mean, 100 * low, 100 * high


def _whiskers(means: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Intervals [N] as lengths below and above their means, [2,N]; none where a mean has no interval."""
    lengths: np.ndarray = np.nan_to_num(np.stack((means - low, high - means)), nan=0.0).clip(min=0)
    return lengths


def _finish(figure: Figure, axis: Any) -> None:
    axis.set_ylim(0, 105)
    axis.set_ylabel("score, %", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        figure.legend(fontsize=6, loc="outside right center")  # inside, it would hide points
