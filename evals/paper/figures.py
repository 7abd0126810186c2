"""What an experiment's run folders show together: one table over models, and the paper's figure where it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.bench.records import BenchRecord
from evals.bench.throughput.report import ratio
from evals.bench.throughput.summary import gains
from evals.paper.published import ROWS
from evals.runs.manifest import Manifest
from evals.runs.results import read_records, read_run
from evals.tables.looks import looks
from evals.tables.plots import new_figure, save
from evals.tables.summary import REFERENCE, Row, summarise
from evals.tables.table import Table, percent, tokens
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import parse_method
from shadowkv.methods.shadowkv.method import ShadowKV


def throughput_summary(folders: Sequence[Path]) -> Table:
    """Measured gains in the form of the paper's table, beside what was published for the same model and context."""
    lines = []
    for folder in folders:
        manifest, records = read_records(folder, BenchRecord)
        model = manifest.model["name"]
        for gain in gains(records):
            if gain.method == REFERENCE:
                continue
            full = "–" if gain.full_tokens_per_s is None else f"{gain.full_tokens_per_s:.2f} ({gain.full_batch})"
            lines.append(
                [
                    " ".join([model, *manifest.marks]),
                    tokens(gain.context),
                    gain.method,
                    full,
                    f"{gain.tokens_per_s:.2f} ({gain.batch})",
                    ratio(gain.gain),
                    _published(model, gain.context, gain.method),
                ]
            )
    columns = ["model", "context", "method", "full tokens/s (batch)", "tokens/s (batch)", "gain", "published gain"]
    caption = (
        "Each at its best batch; gain: median (lowest-highest) over repeats. Published: ShadowKV's authors on one "
        "A100-80GB; another machine has other gains."
    )
    return Table("Decode throughput", columns, lines, caption, names=3)


def _published(model: str, context: int, method: str) -> str:
    """The authors' gain with this very setting; a dash for any other."""
    for row in ROWS:
        if (row.model, row.context, ShadowKV(budget=row.budget).label) == (model, context, method):
            return f"{row.shadowkv_tokens_per_s / row.full_tokens_per_s:.2f}"
    return "–"


def notes_of_runs(folders: Sequence[Path]) -> list[str]:
    """What the runs say of themselves, each with the folders that say it."""
    said: dict[str, list[str]] = {}
    for folder in folders:
        for note in Manifest.read(folder / "run.json").notes:
            said.setdefault(note, []).append(folder.name)
    return [f"{', '.join(names)}: {note}" for note, names in said.items()]


def accuracy_summary(folders: Sequence[Path]) -> Table:
    """Scores of every model, method and length."""
    lines = []
    for folder in folders:
        manifest, records = read_run(folder)
        for row in summarise(records):
            name = " ".join([manifest.model["name"], *manifest.marks])
            scored = f"{row.scored}/{row.total}"
            lines.append([name, folder.name, tokens(row.length), row.method, percent(row.score), _spread(row), scored])
    columns = ["model", "run", "length", "method", "score, %", "95 %", "scored"]
    return Table("Scores", columns, lines, "Intervals: 95 % bootstrap over samples.", names=4)


def write_ablations(path: Path, folder: Path, base: str) -> Path:
    """Score against each parameter that was changed in `base` alone, one panel each; the dashed line is full attention.

    Shaded: 95 % bootstrap intervals over samples.
    """
    manifest, records = read_run(folder)
    rows = {row.method: row for row in summarise(records)}
    panels = ablated(base, rows)
    if not panels:
        raise SkvError(f"{folder} holds no setting of {base} with one parameter changed")
    model = " ".join([manifest.model["name"], *manifest.marks])
    title = f"{manifest.benchmark} · {model} · around {base}"
    figure = new_figure(2.6 * len(panels) + 0.6, 3.0, title)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    full, drawn = rows.get(REFERENCE), looks([REFERENCE, base])
    look = drawn[base]
    for axis, (parameter, points) in zip(axes, panels.items(), strict=True):
        known = sorted((value, row) for value, row in points.items() if row.score is not None)
        at = range(len(known))
        axis.plot(at, [100 * (row.score or 0) for _, row in known], ms=4, **look.style)
        low, high = ([100 * (getattr(row, end) or 0) for _, row in known] for end in ("score_low", "score_high"))
        axis.fill_between(at, low, high, color=look.colour, alpha=0.15, lw=0)
        if full is not None and full.score is not None:
            axis.axhline(100 * full.score, color=drawn[REFERENCE].colour, ls="--", lw=0.8)
        axis.set_xticks(at, [str(value) for value, _ in known])
        axis.set_xlabel(parameter, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 105)
    axes[0].set_ylabel("score, %", fontsize=8)
    return save(figure, path)


def ablated(base: str, rows: Mapping[str, Row]) -> dict[str, dict[Any, Row]]:
    """By parameter: rows of the settings that differ from `base` in it alone, by its value, the base among them."""
    method: Any = parse_method(base)
    panels: dict[str, dict[Any, Row]] = {}
    for label, row in rows.items():
        if not label.startswith(f"{method.name}:"):
            continue
        params = parse_method(label).params()
        changed = [key for key, value in params.items() if value != method.params()[key]]
        if len(changed) == 1:
            panels.setdefault(changed[0], {})[params[changed[0]]] = row
    if method.label in rows:
        # What is automatic stands on the axis as the number that it comes to.
        reference = {**method.params(), "outliers": method.outlier_chunks}
        for key, points in panels.items():
            points[reference[key]] = rows[method.label]
    return panels


def _spread(row: Row) -> str:
    return "–" if row.score_low is None else f"{percent(row.score_low)}–{percent(row.score_high)}"
