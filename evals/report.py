"""Tables and pictures of a run folder, always rebuildable from run.json and samples.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from evals.costs import cost_table
from evals.longbench.report import longbench_tables, v2_tables, write_longbench_plots, write_v2_plots
from evals.niah.report import niah_tables, write_niah_plots
from evals.page import heading, page
from evals.plots import write_score_by_bytes
from evals.quality import quality_tables, write_quality_by_layer
from evals.results import Record, read_run
from evals.ruler.report import ruler_tables, write_ruler_plots
from evals.summary import Row, summarise, task_scores
from evals.tables import Table


@dataclass(frozen=True)
class Presentation:
    """What a benchmark shows beside the summary by method and length."""

    tables: Callable[[Sequence[Record]], list[Table]]
    plots: Callable[[Path, Sequence[Record], str], list[Path]]  # folder, records, title -> files written


@dataclass(frozen=True)
class Report:
    """What was made of a run folder."""

    rows: list[Row]
    tables: list[Table]
    files: list[Path]


PRESENTATIONS: Mapping[str, Presentation] = MappingProxyType(
    {
        "niah": Presentation(niah_tables, write_niah_plots),
        "ruler": Presentation(ruler_tables, write_ruler_plots),
        "longbench": Presentation(longbench_tables, write_longbench_plots),
        "longbench-v2": Presentation(v2_tables, write_v2_plots),
    }
)


def write_reports(folder: Path) -> Report:
    """Write summary.csv, tasks.csv, summary.md and plots/ of a run folder."""
    import pandas as pd

    manifest, records = read_run(folder)
    shown = PRESENTATIONS[manifest.benchmark]
    rows, quality, title = summarise(records), quality_tables(records), heading(manifest)
    tables = [*shown.tables(records), *quality]
    notes = {"notes": "; ".join(manifest.notes)}
    pd.DataFrame([asdict(row) | notes for row in rows]).to_csv(folder / "summary.csv", index=False)
    pd.DataFrame([asdict(cell) | notes for cell in task_scores(records)]).to_csv(folder / "tasks.csv", index=False)
    (folder / "summary.md").write_text(
        page(title, manifest, [cost_table("Score and cost", rows), *tables]), encoding="utf-8"
    )
    (folder / "plots").mkdir(exist_ok=True)
    plots = shown.plots(folder / "plots", records, title) if records else []
    if quality:
        plots.append(write_quality_by_layer(folder / "plots" / "quality_by_layer.png", records, title))
    if len({row.method for row in rows if row.device_bytes}) > 1:
        plots.append(write_score_by_bytes(folder / "plots" / "score_by_bytes.png", rows, title))
    return Report(rows, tables, [folder / name for name in ("summary.csv", "tasks.csv", "summary.md")] + plots)
