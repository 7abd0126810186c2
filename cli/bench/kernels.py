"""`skv bench kernels`."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from cli.bench.asked_kernels import AskedKernels, KernelSettings
from cli.shared.options import with_options

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from evals.bench.kernels.kernels import KernelBench, KernelRecord
    from evals.bench.kernels.report import KernelReport
    from shadowkv.kernels.backend import CompiledKernel

EPILOG = (
    "Examples:\n\n"
    "skv bench kernels --device cuda --out results/kernels        # Llama 3.1 8B's geometry, 8 x 122k\n\n"
    "skv bench kernels --device cuda --only chunk_scores,choose_chunks --steps 20\n\n"
    "skv bench kernels --model glm4-9b-1m --context 60k --batch 16 -m shadowkv:rank=160,budget=4096,values=int8\n\n"
    "skv bench kernels --compile sm_80,sm_90        # on a CPU: interpreter, and registers on GPUs that are not here"
)


@with_options(KernelSettings, "settings")
def kernels(settings: KernelSettings) -> int:
    """Every kernel of the fast engine against its plain-torch twin, then how fast it is for this machine.

    On a CPU kernels are checked in Triton's interpreter, at small sizes; times need a GPU. Exit code 1 if any differs.
    """
    _check(settings)
    _settle_interpreter(settings.device)
    asked = AskedKernels(settings)
    if settings.dry_run:
        return _show_plan(asked)
    return _run(asked) if settings.out is None else _run_into(settings.out, asked)


def _check(settings: KernelSettings) -> None:
    """Refuse what can be refused without looking at any model."""
    from cli.shared.checks import check_dtype, check_writable
    from evals.bench.kernels.compilation import parse_targets
    from shadowkv.common.errors import SkvError
    from shadowkv.kernels.backend import has_triton

    check_dtype(settings.dtype)
    for option, value, least in (
        ("--batch", settings.batch, 1),
        ("--steps", settings.steps, 1),
        ("--warmup", settings.warmup, 0),
    ):
        if value < least:
            raise SkvError(f"{option} must be at least {least}, got {value}")
    if not 0 < settings.misses <= 1:
        raise SkvError(f"--misses {settings.misses} is not a share in (0, 1]")
    if settings.compile_for is not None:
        parse_targets(settings.compile_for)
    if settings.out is not None:
        check_writable(settings.out)
    if not has_triton():
        raise SkvError("kernels need Triton: pip install 'skv[gpu]'")


def _settle_interpreter(device: str) -> None:
    """Have kernels interpreted where there is no GPU. Triton looks once, when loaded, and transformers loads it."""
    import torch

    from shadowkv.common.errors import SkvError
    from shadowkv.kernels.backend import interpreted

    if device == "cpu" or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    elif interpreted():
        raise SkvError("TRITON_INTERPRET=1 would time Triton's interpreter: unset it, or give --device cpu")


def _run(asked: AskedKernels) -> int:
    from evals.bench.kernels.report import report_of

    records = _measured(asked, _bench(asked), ())
    return _tell(asked, report_of(asked.manifest, records, _compiled(asked)), "")


def _run_into(out: Path, asked: AskedKernels) -> int:
    from evals.bench.kernels.kernels import KernelRecord
    from evals.bench.kernels.report import COMPILED_FILE, read_compiled, report_of, write_compiled
    from evals.reporting.files import write_run
    from evals.runs.results import open_records

    bench = _bench(asked)
    with open_records(out, asked.manifest, KernelRecord) as folder:
        found = folder.records.values()
        done = {(r.kernel, r.variant) for r in found} - {(r.kernel, r.variant) for r in found if not r.final}
        for record in _measured(asked, bench, done):
            if not folder.has(record.key):
                folder.append(record)
        if asked.targets:
            write_compiled(out, _compiled(asked))
        compiled = read_compiled(out)
        files = [folder.file, *([out / COMPILED_FILE] if compiled else []), *write_run(out)[1]]
        report = report_of(folder.manifest, list(folder.records.values()), compiled)
    return _tell(asked, report, f"{out}: run.json {' '.join(file.name for file in files)}")


def _bench(asked: AskedKernels) -> KernelBench:
    """On a GPU with a timer, and the rates that it finds."""
    import torch

    from evals.bench.kernels.gpu_timing import GpuTimer
    from evals.bench.kernels.kernels import KernelBench

    device = torch.device(asked.device)
    if not asked.on_gpu:
        return KernelBench(device, asked.machine, "interpreter")
    timer = GpuTimer(device, asked.settings.warmup, asked.settings.steps)
    return KernelBench(device, asked.machine, "triton", timer, timer.rates(asked.work.case.dtype))


def _measured(asked: AskedKernels, bench: KernelBench, done: Collection[tuple[str, str]]) -> Iterator[KernelRecord]:
    """Records, as they come, of every kernel but those whose name and variant are done."""
    from cli.shared.render import progress_bar

    left = [item for item in asked.items if (item.kernel, item.variant) not in done]
    with progress_bar(shown=not (asked.settings.quiet or asked.settings.as_json)) as advance:
        for place, item in enumerate(left):
            advance(place, len(left), f"{item.kernel} {item.variant}")
            yield from bench.measure(item)
        advance(len(left), len(left), "done")


def _compiled(asked: AskedKernels) -> list[CompiledKernel]:
    """What --compile asks for, in bf16 where no type was named."""
    from evals.bench.kernels.compilation import compile_for
    from shadowkv.kernels.launch import padded

    dtype = "bfloat16" if asked.settings.dtype == "auto" else asked.dtype
    return compile_for(asked.targets, dtype, padded(asked.dims.head_dim)) if asked.targets else []


def _tell(asked: AskedKernels, report: KernelReport, written: str) -> int:
    from cli.shared.render import print_notes, print_table
    from shadowkv.common.wording import plain_line

    settings = asked.settings
    if settings.as_json:
        told = {"folder": str(settings.out) if settings.out else None, "model": asked.source.name, "sizes": asked.sizes}
        print(json.dumps({**told, **report.as_json()}, indent=1))
    elif not settings.quiet:
        for table in report.tables:
            print_table(table)
        print_notes(report.notes)
        if written:
            print(written)
    unsettled = [record for record in report.records if record.status not in ("ok", "skipped")]
    for record in unsettled:
        said = f"{' '.join(filter(None, record.key))}: {record.error}"
        print(f"skv: {record.status}: {plain_line(said)}", file=sys.stderr)
    return 1 if unsettled else 0


def _show_plan(asked: AskedKernels) -> int:
    from cli.shared.render import print_notes, print_table
    from evals.tables.table import Table

    lines = [[item.kernel, item.variant] for item in asked.items]
    if asked.settings.as_json:
        rows = [dict(zip(("kernel", "variant"), line, strict=True)) for line in lines]
        told = {"model": asked.source.name, "sizes": asked.sizes, "notes": asked.notes, "rows": rows}
        print(json.dumps(told, indent=1))
        return 0
    print_table(Table(asked.manifest.title, ["kernel", "variant"], lines, "Nothing was run.", names=2))
    print_notes(asked.notes)
    return 0
