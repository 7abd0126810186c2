"""`skv leaderboard`: one ranking of many runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = "Example:\n\nskv leaderboard results/baselines/* --out results/leaderboard"


def leaderboard(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of accuracy benchmarks.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for leaderboard.html and leaderboard.md.")] = Path(
        "results/leaderboard"
    ),
) -> int:
    """Rank methods over run folders, by benchmark, model and length; only what was asked the same is averaged."""
    from cli.shared.render import print_table, say_problems
    from evals.reporting.folders import find_runs
    from evals.reporting.leaderboard import rank, write_leaderboard

    found = find_runs(runs)
    board = rank(found)
    files = write_leaderboard(board, out)
    for group in board.groups:
        print_table(group.table)
    say_problems(found, {**board.left_out})
    print(f"{out}: {' '.join(file.name for file in files)}")
    return 1 if board.left_out else 0
