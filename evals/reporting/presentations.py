"""Tables and plots of accuracy runs, those of all benchmarks and those of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from evals.longbench.report import longbench_tables, v2_tables, write_longbench_plots, write_v2_plots
from evals.niah.report import niah_tables, write_niah_plots
from evals.ruler.report import right_or_wrong, ruler_tables, write_ruler_plots
from evals.runs.manifest import Manifest
from evals.runs.results import Record
from evals.tables.attempts import PassRate, attempt_tables, pass_rates
from evals.tables.plots import write_score_by_bytes, write_score_by_length, write_score_dots
from evals.tables.quality import quality_tables, write_quality_by_layer
from evals.tables.summary import Row
from evals.tables.table import Table


@dataclass(frozen=True)
class Presentation:
    """What a benchmark shows beside the summary by method and length."""

    tables: Callable[[Sequence[Record]], list[Table]]
    plots: Callable[[Path, Sequence[Record], str], list[Path]]  # folder, records, title -> files written
    needs: tuple[str, ...] = ()  # of a record's meta
    right_or_wrong: Callable[[Record], bool] = lambda _: False  # whether an answer's score is 0 or 1 and nothing else


_OUTGROWN = ("scores", "score_by_length", "tasks_*")  # plots that are of one length only, or of few methods


PRESENTATIONS: Mapping[str, Presentation] = MappingProxyType(
    {
        "niah": Presentation(niah_tables, write_niah_plots, ("depth",), lambda _: True),
        "ruler": Presentation(ruler_tables, write_ruler_plots, right_or_wrong=right_or_wrong),
        "longbench": Presentation(longbench_tables, write_longbench_plots, ("bucket",)),
        "longbench-v2": Presentation(v2_tables, write_v2_plots, ("difficulty", "length"), lambda _: True),
    }
)


def accuracy_tables(manifest: Manifest, records: Sequence[Record]) -> list[Table]:
    """The benchmark's own tables, those of answers drawn or thought about, and those of diagnostics."""
    own = PRESENTATIONS[manifest.benchmark]
    return [*own.tables(records), *attempt_tables(records, own.right_or_wrong), *quality_tables(records)]


def accuracy_pass_rates(manifest: Manifest, records: Sequence[Record]) -> list[PassRate]:
    """pass@k of drawn answers, unrounded; none of greedy ones."""
    return pass_rates(records, PRESENTATIONS[manifest.benchmark].right_or_wrong)


def write_accuracy_plots(
    folder: Path, manifest: Manifest, records: Sequence[Record], rows: Sequence[Row]
) -> list[Path]:
    """Score by length (or by method, of one length) and by bytes, the benchmark's own plots, those of diagnostics.

    Plots of fewer records, which are not drawn any more, are removed.
    """
    for stale in [path for name in _OUTGROWN for kind in ("png", "svg") for path in folder.glob(f"{name}.{kind}")]:
        stale.unlink()
    scored = [row for row in rows if row.score is not None]
    if not scored:
        return []
    title, made = manifest.title, []
    if len({row.length for row in scored}) > 1:
        made.append(write_score_by_length(folder / "score_by_length.png", records, title))
    elif len(scored) > 1:
        made.append(write_score_dots(folder / "scores.png", scored, title))
    if len({row.method for row in scored if row.device_bytes}) > 1:
        made.append(write_score_by_bytes(folder / "score_by_bytes.png", rows, title))
    made += PRESENTATIONS[manifest.benchmark].plots(folder, records, title)
    if quality_tables(records):
        made.append(write_quality_by_layer(folder / "quality_by_layer.png", records, title))
    return made
