"""Tables and pictures of a run folder, always rebuildable from run.json and samples.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from evals.longbench.report import longbench_tables, v2_tables, write_longbench_plots, write_v2_plots
from evals.manifest import Manifest
from evals.niah.report import niah_tables, write_niah_plots
from evals.plots import write_score_by_bytes
from evals.quality import quality_tables, write_quality_by_layer
from evals.results import Record, read_run
from evals.ruler.report import ruler_tables, write_ruler_plots
from evals.summary import Row, summarise, task_scores
from evals.tables import Table, kib, mib, number


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
    rows, tables = summarise(records), [*shown.tables(records), *quality_tables(records)]
    notes = {"notes": "; ".join(manifest.notes)}
    pd.DataFrame([asdict(row) | notes for row in rows]).to_csv(folder / "summary.csv", index=False)
    pd.DataFrame([asdict(cell) | notes for cell in task_scores(records)]).to_csv(folder / "tasks.csv", index=False)
    (folder / "summary.md").write_text(markdown(manifest, rows, tables), encoding="utf-8")
    (folder / "plots").mkdir(exist_ok=True)
    plots = shown.plots(folder / "plots", records, title(manifest)) if records else []
    if tables and any("diagnostics" in record.meta for record in records):
        plots.append(write_quality_by_layer(folder / "plots" / "quality_by_layer.png", records, title(manifest)))
    if len({row.method for row in rows if row.device_bytes}) > 1:
        plots.append(write_score_by_bytes(folder / "plots" / "score_by_bytes.png", rows, title(manifest)))
    return Report(rows, tables, [folder / name for name in ("summary.csv", "tasks.csv", "summary.md")] + plots)


def title(manifest: Manifest) -> str:
    """One line that says what was run on what."""
    model = manifest.model
    return f"{manifest.benchmark} · {model['name']} · {model['dtype']} on {model['device']}"


def cost_table(rows: Sequence[Row]) -> Table:
    """Methods x lengths: score first, then what it cost."""
    head = [
        *("method", "length", "score", "95 %", "scored", "agreement", "attended", "KV device MiB", "KV host MiB"),
        "bus KiB/token",
        *("prefill s", "build s", "decode ms/token p10 / p50 / p90"),
    ]
    lines = []
    for row in rows:
        times = " / ".join(number(x, ".1f") for x in (row.decode_ms_p10, row.decode_ms_p50, row.decode_ms_p90))
        lines.append(
            [
                *(row.method, str(row.length), number(row.score, ".2f")),
                *(interval(row.score_low, row.score_high), f"{row.scored}/{row.total}"),
                *(number(row.agreement, ".2f"), number(row.attended_tokens, ".0f")),
                *(mib(row.device_bytes), mib(row.host_bytes), kib(row.bus_bytes)),
                *(number(row.prefill_s, ".2f"), number(row.build_s, ".3f"), times),
            ]
        )
    caption = (
        "Score: mean over scored answers, of each task and then over tasks, with a 95 % bootstrap interval over "
        "samples. Agreement: share of tokens 2..n equal to full attention's; the first token comes from the prefill "
        "under every method. Attended: tokens per decode step, mean over layers and heads, at most. Bus: bytes that a "
        "decoded token moves between host and device. Prefill: median, once per prompt for all methods."
    )
    return Table("Score and cost", head, lines, caption)


def interval(low: float | None, high: float | None) -> str:
    """A confidence interval, or a dash."""
    return "–" if low is None or high is None else f"{low:.2f}–{high:.2f}"


def markdown(manifest: Manifest, rows: Sequence[Row], tables: Sequence[Table]) -> str:
    """The tables in Markdown, with what a reader must know above and below them."""
    session = manifest.sessions[-1]
    lines = [f"# {title(manifest)}", "", *(f"**{note}**\n" for note in manifest.notes)]
    lines += [table.markdown() for table in (cost_table(rows), *tables)]
    versions = ", ".join(f"{name} {version}" for name, version in session.versions.items())
    machine = f"{session.machine.get('gpu') or session.machine['cpu']}, {session.machine['torch_threads']} threads"
    commands = [f"`{command}`\n" for command in dict.fromkeys(session.command for session in manifest.sessions)]
    return "\n".join([*lines, *commands, f"{machine} · {versions}"]) + "\n"
