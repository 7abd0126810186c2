"""`skv baseline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Examples:\n\n"
    "skv baseline update results/regression/niah --name regression-niah-smollm2-135m --reason 'Quest reads whole pages'"
    "\n\n"
    "skv baseline update results/new --into ci/baselines --changelog ci/CHANGES.md"
)


def update(
    run: Annotated[Path, typer.Argument(help="The run folder that is to be the baseline.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Name of the baseline; the run folder's own without one.")] = None,
    reason: Annotated[str, typer.Option(help="Why, in a few words, for the changelog.")] = "",
    into: Annotated[Path, typer.Option(help="Folder of all baselines.")] = Path("results/baselines"),
    changelog: Annotated[Path, typer.Option(help="File that gets the line.")] = Path("CHANGELOG.md"),
    force: Annotated[bool, typer.Option("--force", help="Also a run that is half-written, unscored or dummy.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> int:
    """Make a run the baseline that `skv compare` is given, and note it in the changelog.

    Refused are runs that were stopped, have answers without a score, or made-up weights.
    """
    from evals.compare.baselines import update_baseline

    done = update_baseline(run, name, into, changelog, reason=reason, force=force)
    if not quiet:
        print(f"{done.folder}: {done.line}")
        print(f"Noted in {changelog}; commit both.")
    return 0
