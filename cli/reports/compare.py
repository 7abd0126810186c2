"""`skv compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Examples:\n\n"
    "skv compare results/baselines/niah results/niah-new\n\n"
    "skv compare OLD NEW --fail-on accuracy=0.02 --fail-on throughput=5% --fail-on memory=1%\n\n"
    "skv compare OLD NEW --fail-on nothing --markdown summary.md --junit compare.xml\n\n"
    "Exit codes: 0 nothing that fails is worse, 1 something is, 2 the runs do not compare."
)


def compare(
    baseline: Annotated[Path, typer.Argument(help="The run folder that is good.", show_default=False)],
    current: Annotated[Path, typer.Argument(help="The run folder in question.", show_default=False)],
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            help="Metric whose loss fails, from a size on; repeatable. Without any: accuracy=0.02, fidelity=5%, "
            "throughput=5%, memory=1%. `nothing` only shows.",
        ),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the comparison as Markdown to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write it as JUnit XML to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON on stdout and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> int:
    """Is CURRENT worse than BASELINE? Two runs of the same questions, compared sample by sample.

    Each cell gets a verdict: better, same, worse, or undecided with the number of samples that are missing. What
    differs by chance alone fails a build at most one time in twenty, however many cells there are.
    """
    import json

    from cli.shared.render import print_notes, print_table
    from evals.compare import report
    from evals.compare.gate import parse_gate
    from evals.compare.run import compare as compare_runs

    gate = parse_gate(fail_on or ())
    for file in (markdown, junit):
        _check_folder(file)
    found = compare_runs(baseline, current, gate)
    if markdown is not None:
        markdown.write_text(report.markdown(found), encoding="utf-8")
    if junit is not None:
        junit.write_text(report.junit(found), encoding="utf-8")
    if as_json:
        print(json.dumps(report.as_json(found), indent=1, allow_nan=False))
    elif not quiet:
        for table in report.tables(found):
            print_table(table)
        print_notes(report.context(found))
        print(f"{report.headline(found)}. {report.gate_line(found)}.")
    return 1 if found.failures else 0


def _check_folder(file: Path | None) -> None:
    """Refuse a file in a folder that is not there, before anything is read."""
    from shadowkv.common.errors import SkvError

    if file is not None and not file.absolute().parent.is_dir():
        raise SkvError(f"cannot write {file}: {file.parent} is not a folder")
