"""`skv bench gpu-day`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from evals.bench.gpu_day.day import Day
    from evals.bench.gpu_day.stages import Stage

EPILOG = (
    "Examples:\n\n"
    "skv bench gpu-day --list\n\n"
    "skv bench gpu-day                                # all stages; the same command goes on where it was\n\n"
    "skv bench gpu-day --only probe,tests,kernels --out results/h100\n\n"
    "skv bench gpu-day --tiny                         # every stage's smallest form, on a CPU"
)


def gpu_day(
    only: Annotated[str | None, typer.Option(help="Stages, in their own order: probe,tests,kernels.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for all results (results/CARD, or results/gpu-day without one).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose weights stages on real text take (the largest preset that is here).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most seconds of a stage, 480 at most; what is begun is kept.")] = (
        None
    ),
    again: Annotated[bool, typer.Option("--again", help="Run stages that are done too; their folders stay.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Show the stages, and run none.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, and run none.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Every stage in its smallest form, on a CPU.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Keep what commands print to their logs.")] = False,
    probe: Annotated[
        Path | None, typer.Option(help="Only look at this machine, in this process, and write JSON to this file.")
    ] = None,
) -> int:
    """All that a rented GPU is to be asked, most valuable first, in stages of at most 8 minutes each.

    Exit code 1 if a stage failed or was cut off; the same command takes up what is left. Nothing is fetched.
    """
    from evals.bench.gpu_day.report import stage_table
    from evals.bench.gpu_day.stages import MOST_SECONDS, choose
    from shadowkv.common.errors import SkvError

    if probe is not None:
        return _probe(probe, tiny)
    chosen = choose(only)
    seconds = MOST_SECONDS if limit is None else limit
    if not 1 <= seconds <= MOST_SECONDS:
        raise SkvError(f"--limit must be 1 to {MOST_SECONDS} seconds, got {seconds}")
    if listed:
        from cli.shared.render import print_table

        print_table(stage_table(chosen, seconds))
        return 0
    day = _day(chosen, out, model, seconds, again=again, tiny=tiny, dry_run=dry_run)
    if dry_run:
        for stage in chosen:
            for words in day.commands(stage):
                print(shlex.join(words))
        return 0
    return _run(day, chosen, quiet=quiet)


def _day(
    chosen: Sequence[Stage],
    out: Path | None,
    model: str | None,
    limit_s: float,
    *,
    again: bool,
    tiny: bool,
    dry_run: bool,
) -> Day:
    from cli.shared.checks import check_writable
    from evals.bench.gpu_day.day import Day, code_root, default_out
    from evals.bench.gpu_day.machine import card_here, missing_modules, real_model
    from evals.bench.gpu_day.tiny import tiny_models, write_tiny_models
    from shadowkv.common.errors import SkvError

    card = None if tiny else card_here()
    if card is None and not tiny and not dry_run:
        raise SkvError("no CUDA device is here; --tiny runs every stage in its smallest form on a CPU")
    more: dict[str, Any] = {}
    folder = out or default_out(card.folder if card else None)
    check_writable(folder)
    if tiny:
        models = folder / "tiny-models"
        needed = not dry_run and any(s.takes_tiny_models and not missing_modules(s) for s in chosen)
        more["tiny_models"] = write_tiny_models(models) if needed else tiny_models(models)
    elif any(stage.weights for stage in chosen):
        more["model"] = real_model(model, card)
    return Day(folder, code_root(), card.name if card else "a CPU", tiny, limit_s, again=again, **more)


def _run(day: Day, chosen: Sequence[Stage], *, quiet: bool) -> int:
    from cli.shared.render import print_table, say
    from evals.bench.gpu_day.machine import lacking_modules
    from evals.bench.gpu_day.report import exit_code_of, summary_table, write_page
    from evals.bench.gpu_day.stages import stages
    from evals.bench.gpu_day.state import FILE

    missing = lacking_modules(chosen)
    if missing:
        say("not here: " + "; ".join(f"{name} ({', '.join(needed)})" for name, needed in missing.items()))
    entries = []
    try:
        with _stops_as_interrupts():
            for place, stage in enumerate(chosen, 1):
                say(f"{place}/{len(chosen)} {stage.name}: {stage.purpose}")
                entry = day.run(stage, (lambda line: None) if quiet else print)
                say(f"{stage.name}: {entry.status}{f': {entry.said}' if entry.said else ''}")
                entries.append(entry)
    finally:
        known = [day.known[name] for name in stages() if name in day.known]
        if known:
            page = write_page(day.out, known, stages(), day.machine, tiny=day.tiny)
    print_table(summary_table(entries, day.machine))
    print(f"{day.out}: {page.name} {FILE}")
    return exit_code_of(entries)


@contextmanager
def _stops_as_interrupts() -> Iterator[None]:
    """A terminal that goes, or a polite kill, stops the command that runs too, and keeps what there is."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _probe(file: Path, tiny: bool) -> int:
    import torch

    from shadowkv.common.errors import SkvError

    if tiny or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # Triton looks once, when it is loaded
    if not file.absolute().parent.is_dir():
        raise SkvError(f"cannot write --probe {file}: {file.parent} is not a folder")
    from evals.bench.gpu_day.probe import Finding, run_probes

    def tell(finding: Finding) -> None:
        said = finding.error or ", ".join(f"{name} {value}" for name, value in finding.found.items())
        print(f"{finding.name}: {finding.status}: {said}", flush=True)

    failed = [finding.name for finding in run_probes(file, tiny=tiny, tell=tell) if finding.status == "failed"]
    if failed:
        print(f"skv: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
