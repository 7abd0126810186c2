"""Plots of a sweep: throughput against batch, gains over full attention, memory by part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator

from evals.bench.throughput.summary import BenchRow, Gain
from evals.bench.timing import Spread
from evals.common.grouping import grouped
from evals.tables.looks import looks
from evals.tables.plots import new_figure, save, wrapped
from evals.tables.summary import REFERENCE
from evals.tables.table import tokens

_APART = 0.06  # octaves of batch between two methods, whose points would hide each other
_OWN, _OF_FULL = "own best batch", "batch of full"
_HATCHES = {_OWN: "", _OF_FULL: "///"}
_PARTS = (("weights", "0.75"), ("KV on the device", "#0072B2"), ("KV on the host", "#E69F00"))


def write_throughput(path: Path, rows: Sequence[BenchRow], title: str) -> Path:
    """Tokens per second against batch, log-log, by context; whiskers over repeats, a cross where memory ended.

    Methods stand a little aside of their batch.
    """
    contexts = grouped(rows, lambda row: row.context)
    drawn = looks([row.method for row in rows])
    places = {method: place for place, method in enumerate(drawn)}
    figure = new_figure(max(4.8, 3.2 * len(contexts) + 1), 3.8, title)
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    for axis, (context, cells) in zip(panels, contexts.items(), strict=True):
        for method, found in grouped(cells, lambda row: row.method).items():
            look, aside = drawn[method], 2 ** (_APART * (places[method] - (len(places) - 1) / 2))
            good = [(row.batch * aside, speed) for row in found if (speed := row.throughput) is not None]
            if good:
                x, y = [batch for batch, _ in good], [speed.median for _, speed in good]
                around = [[s.median - s.low for _, s in good], [s.high - s.median for _, s in good]]
                axis.errorbar(x, y, around, label=method, ms=4, lw=1.2, capsize=2, **look.style)
            short = [row.batch * aside for row in found if row.status == "oom"]
            if short:
                height = good[-1][1].median if good else 1.0
                axis.plot(short[:1], [height], "x", color=look.colour, ms=8, mew=2)
                axis.annotate("OOM", (short[0], height), fontsize=6, color=look.colour, xytext=(4, 4),
                              textcoords="offset points")  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_locator(LogLocator(2, subs=(1, 1.5)))
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(tokens(context), fontsize=8)
        axis.set_xlabel("batch", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("decoded tokens/s", fontsize=8)
    handles = dict(zip(*reversed([list(x) for x in _legend(panels)]), strict=True))
    figure.legend(list(handles.values()), list(handles), fontsize=6, loc="outside right center")
    return save(figure, path)


def _legend(panels: Sequence[object]) -> tuple[list[object], list[str]]:
    pairs = [axis.get_legend_handles_labels() for axis in panels]  # type: ignore[attr-defined]
    return [h for handles, _ in pairs for h in handles], [name for _, names in pairs for name in names]


def write_gain_bars(path: Path, found: Sequence[Gain], title: str) -> Path:
    """Throughput over full attention's, by context: each at its own best batch and, hatched, at full attention's.

    One bar where these are the same batch.
    """
    others = [gain for gain in found if gain.method != REFERENCE]
    contexts = list(dict.fromkeys(gain.context for gain in found))
    labels = list(dict.fromkeys(gain.method for gain in others))
    drawn = looks([REFERENCE, *labels])
    most = max((len(_ratios(gain)) for gain in others), default=1)
    figure = new_figure(max(5.6, 1.6 + 0.45 * most * len(contexts) * max(len(labels), 1)), 3.8, title)
    axis = figure.subplots()
    width = 0.8 / max(most * len(labels), 1)
    named = set[str]()
    for gain in others:
        look, ratios = drawn[gain.method], _ratios(gain)
        middle = contexts.index(gain.context) + (labels.index(gain.method) + 0.5 - len(labels) / 2) * most * width
        for place, (batch, ratio) in enumerate(ratios.items()):
            x = middle + (place + 0.5 - len(ratios) / 2) * width
            if ratio is None:
                axis.text(x, 0.02, "–", ha="center", fontsize=7, color=look.colour)
                continue
            around = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            name = f"{gain.method}, {batch}"
            axis.bar(x, ratio.median, width, yerr=around, color=look.colour, hatch=look.hatch + _HATCHES[batch],
                     label=None if name in named else name, ecolor="0.3", error_kw={"lw": 0.9},
                     edgecolor="white")  # fmt: skip
            named.add(name)
            if batch == _OWN:
                said = f"{ratio.median:.2f}x\n({gain.batch})"
                axis.text(x, ratio.high, said, ha="center", va="bottom", fontsize=6)
    axis.axhline(1, color="black", lw=0.8)
    axis.margins(y=0.15)
    full = {gain.context: gain for gain in found if gain.method == REFERENCE}
    below = [f"{tokens(c)}\nfull: {full[c].tokens_per_s:.1f} ({full[c].batch})" if c in full else tokens(c)
             for c in contexts]  # fmt: skip
    axis.set_xticks(range(len(contexts)), below)
    axis.set_ylabel("tokens/s over full attention's", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", alpha=0.3)
    if labels:
        figure.legend(fontsize=6, loc="outside right center")
    return save(figure, path)


def _ratios(gain: Gain) -> dict[str, Spread | None]:
    """Those that differ, by the batch that they are at."""
    own = {_OWN: gain.gain}
    return own if gain.full_batch in (None, gain.batch) else {**own, _OF_FULL: gain.gain_equal}


def write_memory_bars(path: Path, rows: Sequence[BenchRow], found: Sequence[Gain], title: str) -> Path:
    """Weights and keys and values on device and host, of each method at its best batch, a panel per context."""
    best = {(gain.context, gain.method): gain.batch for gain in found}
    shown = [row for row in rows if row.status == "ok" and best.get((row.context, row.method)) == row.batch]
    contexts = grouped(shown, lambda row: row.context)
    most = max(len(cells) for cells in contexts.values())
    figure = new_figure(max(4.8, 1 + 0.8 * most * len(contexts)), 4.0, title)
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    for axis, (context, cells) in zip(panels, contexts.items(), strict=True):
        bottom = np.zeros(len(cells))
        sizes = ([row.weights_bytes for row in cells], [row.kv_device_bytes for row in cells],
                 [row.kv_host_bytes for row in cells])  # fmt: skip
        for (name, colour), values in zip(_PARTS, sizes, strict=True):
            height = np.array([value or 0 for value in values]) / 2**30
            axis.bar(range(len(cells)), height, bottom=bottom, label=name, color=colour)
            bottom += height
        axis.use_sticky_edges = False  # or the highest bar would end on the frame
        axis.margins(y=0.05)
        names = [f"{wrapped(row.method)}\nx {row.batch}" for row in cells]
        axis.set_xticks(range(len(cells)), names, fontsize=6)
        axis.set_title(tokens(context), fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(axis="y", alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("GiB at the best batch", fontsize=8)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=6, ncols=len(_PARTS), loc="outside lower center")
    return save(figure, path)
