"""`skv report`: run folders as pages, tables and files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Examples:\n\n"
    "skv report results/niah-smollm2-135m-1f0c2d3e\n\n"
    "skv report results/baselines/* --out results/report\n\n"
    "skv report RUN --export lm-eval --export parquet"
)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of any benchmark.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to (that of the run; results/report for several).")
    ] = None,
    exports: Annotated[
        list[str] | None,
        typer.Option("--export", help="Also write the answers for other tools: lm-eval or parquet; repeatable."),
    ] = None,
) -> int:
    """Make report.html, summary.md, summary.csv, summary.tex and plots of run folders.

    All of it is made anew from the records of the folders, without a model. report.html is one file that needs no
    network, with a browser of all answers. Exit code 1: something could not be
    read, and the report says what.
    """
    from evals.exports.formats import find_export
    from evals.reporting.files import write_report
    from evals.reporting.folders import find_runs

    wanted = {name: find_export(name) for name in exports or ()}
    found = find_runs(runs)
    folder = out or (runs[0] if len(runs) == 1 else Path("results") / "report")
    files = write_report(found, folder)
    files += [file for write in wanted.values() for file in write(found.runs, folder)]
    from cli.shared.render import say_problems

    say_problems(found)
    shown = [str(file.relative_to(folder)) for file in files if file.suffix not in (".png", ".svg")]
    print(f"{folder}: {' '.join(shown)} and {sum(file.suffix == '.png' for file in files)} plots")
    return 1 if found.left_out else 0
