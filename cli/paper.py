"""`skv paper`: the ShadowKV paper's experiments by name."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.shared.exits import exit_code

if TYPE_CHECKING:
    from evals.paper.recipes import Recipe, Step

EPILOG = (
    "Examples:\n\n"
    "skv paper --list\n\n"
    "skv paper ablations --scale smoke\n\n"
    "skv paper throughput --scale full --model llama3.1-8b --device cuda\n\n"
    "skv paper ruler --scale full --dry-run"
)
_SMOKE = "smoke scale: a small model on short prompts shows that everything works, and nothing of the paper's claims"


def paper(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="throughput, ruler, niah, longbench or ablations.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Name the experiments and stop.")] = False,
    scale: Annotated[
        str, typer.Option(help="smoke: a small model, minutes on a CPU; full: the paper's models and sizes.")
    ] = "smoke",
    models: Annotated[
        list[str] | None, typer.Option("--model", help="Models instead of the scale's own; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run folders and paper.md (results/paper/NAME-SCALE).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    data: Annotated[Path | None, typer.Option(help="For longbench: its rows, a folder or data.zip.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing, as with SKV_OFFLINE=1.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and run none.")] = False,
) -> int:
    """Run an experiment of the ShadowKV paper (arXiv 2410.21465): the commands it takes, then one table and figure.

    Interrupt at will: the same command continues.
    """
    from evals.paper.recipes import find_recipe, recipes
    from shadowkv.common.errors import SkvError
    from shadowkv.common.names import did_you_mean

    if listed or name is None:
        _list(list(recipes().values()))
        return 0
    recipe = find_recipe(name)
    from evals.paper.recipes import MODELS, SCALES, SMOKE_MODEL

    if scale not in SCALES:
        raise SkvError(f"unknown scale '{scale}'{did_you_mean(scale, SCALES)}; one of {', '.join(SCALES)}")
    if data is not None and name != "longbench":
        raise SkvError(f"--data is for longbench; {name} takes none")
    folder = out or Path("results") / "paper" / f"{name}-{scale}"
    steps = recipe.steps(scale, models or ((SMOKE_MODEL,) if scale == "smoke" else MODELS))
    more = ["--device", device, *(["--data", str(data)] if data else []), *["--offline"] * offline]
    commands = {folder / step.folder: [*step.words, *more, "--out", str(folder / step.folder)] for step in steps}
    if dry_run:
        for command in commands.values():
            print(shlex.join(["skv", *command]))
        return 0
    code = _run(context.find_root().command, commands)
    if code in (0, 1):
        _report(recipe, scale, folder, steps)
    return code


def _list(known: Sequence[Recipe]) -> None:
    from cli.shared.render import print_table
    from evals.tables.table import Table

    rows = [
        [recipe.name, recipe.summary, f"skv pull {' '.join(recipe.needs)}" if recipe.needs else "–"] for recipe in known
    ]
    print_table(Table("experiments of the ShadowKV paper", ["name", "what it is", "needs"], rows, names=3))


def _run(app: Callable[..., Any], commands: dict[Path, list[str]]) -> int:
    """Run every command; the worst exit code, or at once that of one that was interrupted or mistaken."""
    worst = 0
    for place, command in enumerate(commands.values(), 1):
        print(f"skv: {place}/{len(commands)}: {shlex.join(['skv', *command])}", file=sys.stderr)
        code = exit_code(app, command)
        if code > 1:
            return code
        worst = max(worst, code)
    return worst


def _report(recipe: Recipe, scale: str, folder: Path, steps: Sequence[Step]) -> None:
    from cli.shared.render import print_notes, print_table
    from evals.paper.figures import accuracy_summary, notes_of_runs, throughput_summary, write_ablations
    from evals.paper.recipes import ABLATION_BASE

    runs = [folder / step.folder for step in steps]
    table = throughput_summary(runs) if recipe.name == "throughput" else accuracy_summary(runs)
    files = ["paper.md"]
    if recipe.name == "ablations":
        for run in runs:
            figure = write_ablations(run / "plots" / "ablations.png", run, ABLATION_BASE[scale])
            files.append(str(figure.relative_to(folder)))
    notes = [_SMOKE, *notes_of_runs(runs)] if scale == "smoke" else notes_of_runs(runs)
    page = [f"# {recipe.name}, {scale} scale", f"The experiment: {recipe.summary}.", table.markdown().rstrip()]
    page += ["\n".join(f"- {note}" for note in notes)] if notes else []
    (folder / "paper.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print_table(table)
    print_notes(notes)
    print(f"{folder}: {' '.join(files)}")
