"""What a report says of one run: tables, plots, and how it was made. One builder for each kind of run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from evals.fidelity.report import fidelity_table, fidelity_tables
from evals.fidelity.summary import shown_forced, summarise_forced
from evals.reporting.folders import Run
from evals.reporting.presentations import accuracy_pass_rates, accuracy_tables, write_accuracy_plots
from evals.tables.costs import cost_table
from evals.tables.statistics import BOOTSTRAP_95
from evals.tables.summary import methods_of, shown_records, summarise, task_scores
from evals.tables.table import Table, tokens

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Section:
    """One run, ready to be written in any form."""

    run: Run
    facts: Mapping[str, str]  # a few numbers that say how large the run is
    rows: Sequence[Any]  # of the headline; their class is that of the kind of run
    tables: Sequence[Table]  # the first is the headline
    data: Mapping[str, pd.DataFrame]  # by file name: what the tables show, unrounded, with the notes in every line
    plots: Sequence[Path]  # PNGs, each with an SVG beside it
    remarks: Sequence[str]  # below the tables
    narrow: Table | None = None  # the headline with fewer columns

    @property
    def title(self) -> str:
        return self.run.manifest.title

    @property
    def notes(self) -> list[str]:
        """What every table must say."""
        return self.run.manifest.notes


def section_of(run: Run, plots: Path) -> Section:
    """Sum a run up and draw its plots, if it has any, into a folder."""
    build = _accuracy if run.is_accuracy else _BUILDERS[run.manifest.benchmark]
    made = build(run, plots)
    marks = "".join(f" {mark}" for mark in run.manifest.marks)
    return replace(made, tables=[_marked(table, marks) for table in made.tables])


def environment(run: Run) -> dict[str, str]:
    """Model, sources, settings, machine and versions, as far as the run says."""
    manifest, model = run.manifest, run.manifest.model
    said = {
        "model": f"{model['name']} ({model['source'] or 'source unknown'})",
        "weights": f"sha256 {model['weights_sha256']}" if model["weights_sha256"] else "checksum unknown",
        "precision": f"{model['dtype']} on {model['device']}",
    }
    for name, source in manifest.sources.items():
        parts = source if isinstance(source, Mapping) else {"name": source}
        nested = {key: value for key, value in parts.items() if isinstance(value, Mapping | list)}
        said[name] = _flat({key: value for key, value in parts.items() if key not in nested})
        said |= {f"{name}: {key}": _flat(value) for key, value in nested.items()}
    said["settings"] = _flat(manifest.config)
    said["selection"] = _flat(manifest.selection)
    if manifest.sessions:
        last = manifest.sessions[-1]
        machine = {key: value for key, value in last.machine.items() if value is not None}
        said["machine"] = _flat(machine)
        said["versions"] = _flat(last.versions)
        said["started"] = ", ".join(session.started for session in manifest.sessions)
        if last.git:
            said["commit"] = f"{last.git['commit']}{' with changes' if last.git['dirty'] else ''}"
    return {name: text for name, text in said.items() if text}


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items() if item is not None)
    return " ".join(map(_flat, value)) if isinstance(value, list) else str(value)


def _marked(table: Table, marks: str) -> Table:
    return table if not marks or table.title.endswith(marks) else replace(table, title=table.title + marks)


def _frame(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([{**row, "notes": "; ".join(notes)} for row in rows])


def _accuracy(run: Run, plots: Path) -> Section:
    records, manifest = shown_records(run.answers), run.manifest
    rows = summarise(records)
    lengths = sorted({r.length for r in records})
    scored = sum(r.score is not None for r in records)
    facts = {
        "methods": str(len(methods_of(run.answers))),
        "tasks": str(len({r.task for r in records})),
        "lengths": ", ".join(map(tokens, lengths)),
        "prompts": f"{len({(r.prompt, r.question) for r in records}):,}",
        "answers scored": f"{scored:,} of {len(records):,}",
    }
    data = {
        "summary.csv": [asdict(row) for row in rows],
        "tasks.csv": [asdict(cell) for cell in task_scores(records)],
        "passes.csv": [asdict(rate) for rate in accuracy_pass_rates(manifest, records)],
    }
    return Section(
        run,
        facts,
        rows,
        [cost_table("Score and cost", rows), *accuracy_tables(manifest, records)],
        {name: _frame(lines, manifest.notes) for name, lines in data.items() if lines},
        write_accuracy_plots(plots, manifest, records, rows),
        [f"Intervals: {BOOTSTRAP_95}."],
        cost_table("Score and cost", rows, dense=True),
    )


def _fidelity(run: Run, plots: Path) -> Section:
    from evals.fidelity.plots import write_fidelity_plots

    records, manifest = shown_forced(run.records), run.manifest
    rows = summarise_forced(records)
    good = [record for record in records if record.final]
    facts = {
        "methods": str(len(methods_of(run.records))),
        "lengths": ", ".join(tokens(length) for length in sorted({r.length for r in records})),
        "prompts": f"{len({r.asked for r in records}):,}",
        "tokens compared": f"{sum(len(r.kl) for r in good):,}",
    }
    compared = ", ".join(sorted({record.compared for record in good})) or "none"
    return Section(
        run,
        facts,
        rows,
        fidelity_tables(records),
        {"summary.csv": _frame([asdict(row) for row in rows], manifest.notes)},
        write_fidelity_plots(plots, records, rows, manifest.title),
        [f"Distributions compared: {compared}. Intervals: {BOOTSTRAP_95}."],
        fidelity_table("Fidelity", rows, dense=True),
    )


def _throughput(run: Run, plots: Path) -> Section:
    from evals.bench.throughput.report import bench_frame, gain_table, notes_of, throughput_table, write_bench_plots
    from evals.bench.throughput.summary import gains, summarise_bench

    records, manifest = run.records, run.manifest
    rows, found = summarise_bench(records), gains(records)
    notes = notes_of(manifest, records, rows)
    return Section(
        run,
        _measured(run),
        rows,
        [throughput_table("Throughput, latency and memory", rows), gain_table(found)],
        {"summary.csv": bench_frame(manifest, rows, notes)},
        write_bench_plots(plots, rows, found, manifest.title),
        [note for note in notes if note not in manifest.notes],
    )


def _latency(run: Run, plots: Path) -> Section:
    from evals.bench.latency.report import latency_notes, latency_table, write_latency_bars

    order = methods_of(run.records)
    records = sorted(run.records, key=lambda r: (r.context, r.batch, order.index(r.method)))
    notes = latency_notes(run.manifest, records)
    good = [record for record in records if record.status == "ok"]
    flat = [{**asdict(r), **{f"{part}_ms": ms for part, ms in r.parts_ms.items()}} for r in records]
    for row in flat:
        del row["parts_ms"], row["conditions"]
    return Section(
        run,
        _measured(run),
        records,
        [latency_table("Decode step by part", records)],
        {"summary.csv": _frame(flat, notes)},
        [write_latency_bars(plots / "latency.png", good, run.manifest.title)] if good else [],
        [note for note in notes if note not in run.manifest.notes],
    )


def _kernels(run: Run, plots: Path) -> Section:
    from evals.bench.kernels.report import read_compiled, report_of

    report = report_of(run.manifest, run.records, read_compiled(run.path))
    rows = [{name: value for name, value in asdict(r).items() if name != "conditions"} for r in run.records]
    tried = [r for r in run.records if r.status != "skipped"]
    good = sum(r.status == "ok" for r in tried)
    return Section(
        run,
        {
            "kernels": str(len({r.kernel for r in run.records})),
            "right": f"{good} of {len(tried)}",
            "compiled": str(len(report.compiled)),
            "machine": ", ".join(dict.fromkeys(r.machine for r in run.records)),
        },
        report.records,
        report.tables,
        {"summary.csv": _frame(rows, run.manifest.notes)},
        [],
        [note for note in report.notes if note not in run.manifest.notes],
    )


def _measured(run: Run) -> dict[str, str]:
    good = sum(r.status == "ok" for r in run.records)
    return {
        "methods": str(len(methods_of(run.records))),
        "contexts": ", ".join(tokens(context) for context in sorted({r.context for r in run.records})),
        "batches": ", ".join(map(str, sorted({r.batch for r in run.records}))),
        "measurements": f"{good:,} of {len(run.records):,}",
        "machine": ", ".join(dict.fromkeys(r.machine for r in run.records)),
    }


_BUILDERS: Mapping[str, Callable[[Run, Path], Section]] = MappingProxyType(
    {"fidelity": _fidelity, "throughput": _throughput, "latency": _latency, "kernels": _kernels}
)
