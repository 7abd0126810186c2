"""`skv bench latency`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.bench.options import BenchSettings
from cli.bench.prepared import Prepared
from cli.shared.choosing import tell_unsupported
from cli.shared.options import with_options

EPILOG = (
    "Examples:\n\n"
    "skv bench latency\n\n"
    "skv bench latency --model smollm2-135m --context 4k -m full -m shadowkv:rank=64,budget=256 -m quest:budget=256\n\n"
    "skv bench latency --model llama3.1-8b --device cuda --context 60k --batch 8 --dummy --synthetic-kv\n\n"
    "skv bench latency --model smollm2-135m --context 2k -m shadowkv --trace step.json    # open in ui.perfetto.dev"
)


@with_options(BenchSettings, "settings")
def latency(
    settings: BenchSettings,
    batch: Annotated[str, typer.Option(help="Batches, ascending, such as 1,4.")] = "1",
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace, which Perfetto opens; one method, context and batch.")
    ] = None,
) -> int:
    """Where a decode step's time goes: selection, value fetch, key rebuild, attention, projections, MLP, sampling.

    Measured by torch's profiler, which slows a step down: by how much is in the table.
    """
    # Some builds of torch's profiler tell stderr of every start and stop; read when torch is loaded, below.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from evals.bench.lists import parse_batches
    from shadowkv.common.errors import SkvError

    batches = parse_batches(batch)
    if batches is None:
        raise SkvError("--batch auto is of `skv bench throughput`; write batches such as 1,4")
    ready = Prepared(settings)
    if trace is not None:
        many = (len(ready.methods) + len(ready.engines), len(ready.contexts), len(batches))
        if many != (1, 1, 1):
            raise SkvError("--trace is of one step's kind: give one -m, one --context and one --batch")
        if not trace.absolute().parent.is_dir():
            raise SkvError(f"cannot write --trace {trace}: {trace.parent} is not a folder")
    if "vllm" in ready.engines:
        raise SkvError("--engine vllm cannot be looked into; --engine hf can")
    tell_unsupported(ready.unsupported)
    if settings.dry_run:
        labels = [*(method.label for method in ready.methods), *(f"full@{name}" for name in ready.engines)]
        planned = {"contexts": ready.contexts, "batches": batches, "methods": labels}
        shown = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in planned.items())
        print(json.dumps(planned, indent=1) if settings.as_json else f"{ready.source.name}: {shown}. Nothing was run.")
        return 0
    return _run(ready, batches, trace)


def _run(ready: Prepared, batches: tuple[int, ...], trace: Path | None) -> int:
    from cli.bench.prepared import folder_for, load, manifest_of
    from cli.shared.render import print_notes, print_table, progress_bar
    from evals.bench.latency.profile import LatencyRecord, measure_latency
    from evals.bench.latency.report import latency_table
    from evals.bench.throughput.sweep import ladder_cells
    from evals.reporting.files import write_run
    from evals.runs.results import open_records
    from shadowkv.common.wording import plain_line

    settings = ready.settings
    loaded = load(ready, graphs=False)  # the parts of a replayed graph cannot be told apart
    selection = {"contexts": ready.contexts, "batches": batches}
    path, manifest = folder_for(manifest_of(loaded, "latency", selection), settings)
    contenders = {contender.label: contender for contender in loaded.contenders}
    cells = [cell for context in ready.contexts for cell in ladder_cells(list(contenders), context, batches, 1)]
    with open_records(path, manifest, LatencyRecord) as folder:
        with progress_bar(shown=not (settings.quiet or settings.as_json)) as advance:
            for place, cell in enumerate(cells):
                advance(place, len(cells), f"{cell.method} @ {cell.context} x {cell.batch}")
                if not folder.has(cell):
                    folder.append(measure_latency(loaded.bench, contenders[cell.method], cell, trace))
                elif trace is not None:
                    measure_latency(loaded.bench, contenders[cell.method], cell, trace)  # the record stays
            advance(len(cells), len(cells), "done")
        section, files = write_run(path)
    records, notes = section.rows, [*section.notes, *section.remarks]
    errors = [record for record in records if record.status == "error"]
    if settings.as_json:
        told: dict[str, Any] = {"folder": str(path), "model": manifest.model, "notes": notes}
        print(json.dumps({**told, "rows": [asdict(record) for record in records]}, indent=1))
    elif not settings.quiet:
        print_table(latency_table(section.title, records))
        print_notes(notes)
        names = [str(file.relative_to(path)) for file in files]
        print(f"{path}: run.json {folder.file.name} {' '.join(names)}{f' · trace: {trace}' if trace else ''}")
    for record in errors:
        said = f"{record.method} @ {record.context} x {record.batch}: {record.error}"
        print(f"skv: failed: {plain_line(said)}", file=sys.stderr)
    return 1 if errors or ready.unsupported else 0
