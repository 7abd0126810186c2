"""`skv calibrate`: what a method learns about a model once, from a text."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.shared.options import WeightOptions, with_options

EPILOG = (
    "Examples:\n\n"
    "skv calibrate\n\n"
    "skv calibrate infinigen --model smollm2-135m\n\n"
    "skv calibrate loki --model smollm2-135m --text book.txt\n\n"
    "skv eval niah --model smollm2-135m -m infinigen -m infinigen:skew=smollm2-135m"
)


@with_options(WeightOptions, "options")
def calibrate(
    options: WeightOptions,
    method: Annotated[str, typer.Argument(help="Method that can be calibrated.")] = "infinigen",
    text: Annotated[str, typer.Option(help="essays (skv pull essays), synthetic, or a .txt, .json, .jsonl file.")] = (
        "essays"
    ),
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the text (2048, for loki 4096; the model's context if less).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What to call the result (the model's name).")] = None,
) -> int:
    """Compute from a text what a method needs to know about a model, and keep it under $SKV_HOME."""
    from cli.shared.asked import AskedModel
    from cli.shared.calibrations import make_calibration, name_for
    from cli.shared.checks import check_dtype
    from cli.shared.render import console
    from cli.shared.which_model import with_model
    from evals.calibration.learning import find_model_learner
    from shadowkv.contract.registry import methods

    find_model_learner(method)
    check_dtype(options.dtype)
    options = with_model(options)
    asked = AskedModel(options)
    path = make_calibration(asked, options, method, text, tokens, (name or name_for(asked)).replace("/", "--"))
    if not options.quiet:
        spelled = f"-m {method}:{methods()[method].calibration}={path.stem.removeprefix(method + '-')}"
        console().print(f"{path}\nuse it as {spelled}", markup=False, highlight=False, soft_wrap=True)
    return 0
