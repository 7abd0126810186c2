"""`skv calibrate`: what a method learns about a model once, from a text."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import WeightOptions, with_options

EPILOG = (
    "Examples:\n\n"
    "skv calibrate\n\n"
    "skv calibrate infinigen --model smollm2-135m\n\n"
    "skv eval niah --model smollm2-135m -m infinigen -m infinigen:skew=smollm2-135m"
)


@with_options(WeightOptions, "options")
def calibrate(
    options: WeightOptions,
    method: Annotated[str, typer.Argument(help="Method that can be calibrated.")] = "infinigen",
    text: Annotated[str, typer.Option(help="essays (skv pull essays), synthetic, or a .txt, .json, .jsonl file.")] = (
        "essays"
    ),
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use.")] = 2048,
    name: Annotated[str | None, typer.Option(help="What to call the result (the model's name).")] = None,
) -> int:
    """Compute from a text what a method needs to know about a model, and keep it under $SKV_HOME."""
    from cli.accuracy import tell_notes
    from cli.asked import AskedModel
    from cli.checks import check_dtype
    from cli.fetching import fetch_missing
    from cli.render import console, status
    from cli.which_model import with_model
    from evals.calibrating import calibration_ids, calibration_of, find_calibrated
    from evals.manifest import model_entry, weight_notes
    from shadowkv.calibration import calibration_file, save_calibration

    learner = find_calibrated(method)
    check_dtype(options.dtype)
    options = with_model(options)
    asked = AskedModel(options)
    if text == "essays":
        fetch_missing(["essays"], offline=options.offline, silent=options.silent)
    ids, about = calibration_ids(asked.tokenizer, text, tokens, asked.context_tokens)
    path = calibration_file(method, (name or asked.source.name).replace("/", "--"))
    with status(f"calibrating {method} on {tokens} tokens", quiet=options.quiet):
        loaded = asked.load()
        layers = calibration_of(learner, loaded.model, ids)
    origin = {"model": loaded.name, "weights_sha256": loaded.weights_sha256 or "unknown"}
    origin |= {"adapter_sha256": loaded.adapter.sha256} if loaded.adapter else {}
    save_calibration(path, layers, {**about, **origin})
    if not options.quiet:
        tell_notes(weight_notes(model_entry(loaded)))
        spelled = f"-m {method}:skew={path.stem.removeprefix(method + '-')}"
        console().print(f"{path}\nuse it as {spelled}", markup=False, highlight=False, soft_wrap=True)
    return 0
