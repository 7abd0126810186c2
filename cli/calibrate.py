"""`skv calibrate`: what a method learns about a model once, from a text."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOG = (
    "Examples:\n\n"
    "skv calibrate infinigen --model smollm2-135m\n\n"
    "skv eval niah --model smollm2-135m -m infinigen -m infinigen:skew=smollm2-135m"
)


def calibrate(
    method: Annotated[str, typer.Argument(help="Method that can be calibrated: infinigen.")],
    model: Annotated[str, typer.Option(help="Preset (skv models), folder, Hub id or .gguf file.")],
    text: Annotated[str, typer.Option(help="essays (skv pull essays), synthetic, or a .txt, .json, .jsonl file.")] = (
        "essays"
    ),
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use.")] = 2048,
    name: Annotated[str | None, typer.Option(help="What to call the result (the model's name).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (fp32 on a CPU, bf16 on a GPU), float32, bfloat16, float16.")] = (
        "auto"
    ),
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the model's repo.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> int:
    """Compute from a text what a method needs to know about a model, and keep it under $SKV_HOME."""
    from cli.render import console, quieten_libraries, status
    from evals.calibrating import calibration_ids, calibration_of, find_calibrated
    from shadowkv.calibration import calibration_file, save_calibration
    from shadowkv.loading import context_tokens, load_config, load_model, pick_device, pick_dtype
    from shadowkv.resolving import resolve

    quieten_libraries()
    learner = find_calibrated(method)
    source = resolve(model, dummy=False)
    context = context_tokens(source, load_config(source, trust_remote_code=trust_remote_code))
    chosen_device = pick_device(device)
    path = calibration_file(method, (name or source.name).replace("/", "--"))
    with status(f"calibrating {method}", quiet=quiet) as update:
        update("loading the model")
        loaded = load_model(
            source,
            device=chosen_device,
            dtype=pick_dtype(chosen_device, dtype),
            dummy=False,
            trust_remote_code=trust_remote_code,
        )
        ids, about = calibration_ids(loaded.tokenizer, text, tokens, context)
        update(f"{tokens} tokens")
        layers = calibration_of(learner, loaded.model, ids)
    origin = {"model": loaded.name, "weights_sha256": loaded.weights_sha256 or "unknown"}
    save_calibration(path, layers, {**about, **origin})
    if not quiet:
        spelled = f"-m {method}:skew={path.stem.removeprefix(method + '-')}"
        console().print(f"{path}\nuse it as {spelled}", markup=False, highlight=False, soft_wrap=True)
    return 0
