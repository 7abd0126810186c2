"""`skv bench throughput`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.bench.options import BenchSettings
from cli.bench.prepared import Prepared
from cli.shared.choosing import tell_unsupported
from cli.shared.options import with_options

if TYPE_CHECKING:
    from evals.bench.records import BenchRecord
    from evals.bench.throughput.sweep import Plan, SweepStep

EPILOG = (
    "Examples:\n\n"
    "skv bench throughput\n\n"
    "skv bench throughput --model smollm2-135m --context 1k,2k,4k --batch 1,2,4 -m full "
    "-m shadowkv:rank=64,budget=256 -m quest:budget=256\n\n"
    "skv bench throughput --model llama3.1-8b --context 60k,122k -m full -m shadowkv -m quest --find-max-batch\n\n"
    "skv bench throughput --model llama3.1-8b --dummy --synthetic-kv --context 122k --memory-cap 80GB --device cuda\n\n"
    "skv bench throughput --model smollm2-135m -m full -m shadowkv --engine hf --dry-run"
)
_MOST = {"cpu": 2, "cuda": 256}  # batches that are climbed to; a search goes further
_MOST_SEARCHED = 256
_REPEATS = {"cpu": 3, "cuda": 5}


@with_options(BenchSettings, "settings")
def throughput(
    settings: BenchSettings,
    batch: Annotated[
        str, typer.Option(help="Batches, ascending, such as 1,2,4; auto: 1, 2, 4, ... to --max-batch.")
    ] = ("auto"),
    repeats: Annotated[
        int | None,
        typer.Option(help="Times that everything is measured (3 on a CPU, 5 on a GPU); methods take turns in each."),
    ] = None,
    find_max_batch: Annotated[
        bool, typer.Option("--find-max-batch", help="Search each method's largest batch, from what is planned.")
    ] = False,
    max_batch: Annotated[
        int | None, typer.Option(help="Largest batch tried (256; without a search 2 on a CPU).")
    ] = None,
    hits: Annotated[
        float | None,
        typer.Option(help="With --synthetic-kv: share of the chosen chunks made to be there already, such as 0.6."),
    ] = None,
) -> int:
    """Tokens per second of each method, by context and batch, with memory, bytes moved and the spread of repeats.

    A method that runs out of memory is recorded as such and the others go on. Prefill and decode are timed apart.
    With nothing given: 1k and 2k tokens, batches 1 and 2 and 3 repeats on a CPU (minutes on two cores); on a GPU 1k to
    4k, batches until memory ends, 5 repeats. Interrupt at will: the same command continues.
    """
    from evals.bench.lists import parse_batches
    from evals.bench.throughput.sweep import Plan
    from shadowkv.common.errors import SkvError

    batches = parse_batches(batch)
    for option, value in (("--repeats", repeats), ("--max-batch", max_batch)):
        if value is not None and value < 1:
            raise SkvError(f"{option} must be at least 1, got {value}")
    if hits is not None and not settings.synthetic_kv:
        raise SkvError("--hits is of made-up keys: add --synthetic-kv, or leave it out and real ones are counted")
    if hits is not None and not 0 <= hits <= 1:
        raise SkvError(f"--hits must be from 0 to 1, got {hits:g}")
    ready = Prepared(settings)
    kind = ready.device.partition(":")[0]
    most = max_batch or (_MOST_SEARCHED if find_max_batch else _MOST.get(kind, 256))
    plan = Plan(ready.contexts, batches, repeats or _REPEATS.get(kind, 5), most, find_max_batch)
    tell_unsupported(ready.unsupported)
    _check_host(ready, plan)
    if settings.dry_run:
        return _show_plan(ready, plan)
    return _run(ready, plan, hits)


def _run(ready: Prepared, plan: Plan, hits: float | None) -> int:
    from cli.bench.prepared import folder_for, load, manifest_of
    from cli.shared.render import print_notes, print_table, progress_bar
    from evals.bench.records import BenchRecord
    from evals.bench.throughput.report import throughput_table
    from evals.bench.throughput.summary import gains
    from evals.bench.throughput.sweep import run_sweep
    from evals.reporting.files import write_run
    from evals.runs.results import open_records
    from shadowkv.common.wording import plain_line

    settings = ready.settings
    loaded = load(ready, hits=hits)
    path, manifest = folder_for(manifest_of(loaded, "throughput", asdict(plan)), settings)
    with open_records(path, manifest, BenchRecord) as folder:
        if folder.repaired_lines and not settings.quiet:
            print(f"skv: repaired an unfinished last line of {folder.file}", file=sys.stderr)
        with progress_bar(shown=not (settings.quiet or settings.as_json)) as advance:

            def on_step(step: SweepStep) -> None:
                advance(step.done, step.total, _said(step.record))

            run_sweep(loaded.bench, loaded.contenders, plan, folder, on_step)
        section, files = write_run(path)
        errors = [r for r in folder.records.values() if r.status == "error"]
    title, rows, notes = section.title, section.rows, [*section.notes, *section.remarks]
    if settings.as_json:
        told: dict[str, Any] = {"folder": str(path), "model": manifest.model, "notes": notes}
        told |= {"rows": [asdict(row) for row in rows]}
        told |= {"gains": [gain.flat() for gain in gains(section.run.records)]}
        print(json.dumps(told, indent=1))
    elif not settings.quiet:
        print_table(throughput_table(title, rows), narrow=throughput_table(title, rows, dense=True))
        print_table(section.tables[1])
        print_notes(notes)
        print(f"{path}: run.json {folder.file.name} {' '.join(str(file.relative_to(path)) for file in files)}")
    for record in errors if not settings.quiet else []:
        said = f"{record.method} @ {record.context} x {record.batch}: {record.error}"
        print(f"skv: failed: {plain_line(said)}", file=sys.stderr)
    return 1 if errors or ready.unsupported else 0


def _said(record: BenchRecord | None) -> str:
    if record is None:
        return "computing the first prompt"
    speed = record.tokens_per_s
    found = record.status.upper() if speed is None else f"{speed:.1f} tokens/s"
    return f"{record.method} @ {record.context} x {record.batch}: {found}"


def _check_host(ready: Prepared, plan: Plan) -> None:
    """Refuse a sweep of which nothing fits the host's memory; say what of it will not."""
    from evals.bench.memory import MemoryShortError
    from shadowkv.common.errors import SkvError

    room, settings = ready.room, ready.settings
    new_tokens = settings.warmup + settings.steps
    fitting, short = 0, dict[str, str]()
    for method in ready.methods:
        for context in ready.contexts:
            for batch in plan.ladder or (1,):
                try:
                    room.check_host(method, context, batch, new_tokens)
                except MemoryShortError as error:
                    short[f"{method.label} @ {context} x {batch}"] = str(error)
                    break
                fitting += 1
    if short and not fitting:
        first, reason = next(iter(short.items()))
        raise SkvError(f"{first} {reason}")
    for what, reason in short.items() if plan.batches else ():
        print(f"skv: note: {what} {reason}; it will be recorded as oom", file=sys.stderr)


def _show_plan(ready: Prepared, plan: Plan) -> int:
    """What would be measured, and the memory that is planned for it."""
    from cli.shared.render import print_table
    from evals.tables.table import Table, mib, tokens

    room, settings = ready.room, ready.settings
    new_tokens = settings.warmup + settings.steps
    rows: list[dict[str, Any]] = []
    for context in ready.contexts:
        for method in ready.methods:
            empty, one = (room.need(method, context, batch, new_tokens) for batch in (0, 1))
            largest = room.largest_batch(method, context, new_tokens, plan.max_batch)
            row = {"device_bytes": one.device - empty.device, "host_bytes": one.host, "largest_batch": largest}
            rows.append({"context": context, "method": method.label, **row})
    told = {
        "model": ready.source.name,
        "weights_bytes": room.model.weight_bytes,
        "batches": list(plan.ladder),
        "find_max_batch": plan.find_max,
        "repeats": plan.repeats,
        "rows": rows,
    }
    if settings.as_json:
        print(json.dumps(told, indent=1))
        return 0
    lines = [
        [tokens(r["context"]), r["method"], mib(r["device_bytes"]), mib(r["host_bytes"]), str(r["largest_batch"])]
        for r in rows
    ]
    batches = ", ".join(map(str, plan.ladder)) or "the largest of each method"
    caption = (
        f"Weights {room.model.weight_bytes / 2**30:.2f} GiB. Batches: {batches}; {plan.repeats} repeats of "
        f"{settings.steps} steps after {settings.warmup} of warm-up. Largest: as planned, at most {plan.max_batch}. "
        "Nothing was run."
    )
    columns = ["context", "method", "device MiB\nper row", "host MiB\nper row", "largest\nbatch"]
    print_table(Table(f"{ready.source.name} ({ready.source.described}) on {ready.device}", columns, lines, caption, 2))
    return 0
