"""Calibrations on the way: what methods need to know of a model is learned when it is first asked for."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from cli.shared.asked import AskedModel

if TYPE_CHECKING:
    from cli.shared.choosing import Asked
    from cli.shared.options import WeightOptions

# Loki's kinds of components are told apart by a text of 4096 tokens and not yet by 2048, on SmolLM2.
DEFAULT_TEXT, DEFAULT_TOKENS, TOKENS = "essays", 2048, MappingProxyType({"loki": 4096})


def name_for(asked: AskedModel) -> str:
    """What a model's own calibration is called."""
    return asked.source.name.replace("/", "--")


def on_calibrations(
    specs: Sequence[Asked], asked: AskedModel, options: WeightOptions, *, make: bool
) -> tuple[list[Asked], dict[str, str]]:
    """Every specification on the model's own calibration, where it asks for that; and those for which none can be had.

    make: learn what is not there yet. Raises `SkvError` where a method that was named cannot have its calibration.
    """
    from shadowkv.common.errors import SkvError

    found: list[Asked] = []
    missing: dict[str, str] = {}
    for one in specs:
        method = one.method.on_calibration(None if asked.dummy else name_for(asked))
        if method == one.method:
            found.append(one)
            continue
        there = all(path.is_file() for path in method.files().values())
        try:
            if make and not there:
                make_calibration(asked, options, method.core.name, DEFAULT_TEXT, None, name_for(asked))
        except SkvError as error:
            if not one.of_a_set:
                raise
            missing[one.spec] = str(error)
            continue
        found.append(one._replace(method=method) if make or there or asked.dummy else one)
    return found, missing


def make_calibration(
    asked: AskedModel, options: WeightOptions, method: str, text: str, tokens: int | None, name: str
) -> Path:
    """Learn what a method needs to know about a model from a text, and keep it; says so on stderr.

    tokens: of the text; None for the usual number, or the model's context.
    """
    import torch

    from cli.shared.fetching import fetch_missing
    from cli.shared.render import say, status
    from evals.calibration.learning import calibration_ids, find_model_learner
    from evals.runs.manifest import model_entry, weight_notes
    from shadowkv.contract.calibration import UNKNOWN, calibration_file, save_calibration

    learn = find_model_learner(method)
    tokens = min(TOKENS.get(method, DEFAULT_TOKENS), asked.context_tokens) if tokens is None else tokens
    if text == "essays":
        fetch_missing(["essays"], offline=options.offline, silent=options.silent)
    ids, about = calibration_ids(asked.tokenizer, text, tokens, asked.context_tokens)
    path = calibration_file(method, name)
    with status(f"calibrating {method} on {tokens} tokens", quiet=options.quiet):
        loaded = asked.load()
        learned = learn(loaded.model, asked.tokenizer, ids)
    origin = {"model": loaded.name, "weights_sha256": loaded.weights_sha256 or UNKNOWN}
    origin |= {"adapter_sha256": loaded.adapter.sha256} if loaded.adapter else {}
    save_calibration(path, learned.layers, {**about, **learned.about, **origin})
    if not options.quiet:
        for note in weight_notes(model_entry(loaded)):
            say(f"note: {note}")
        said = "".join(f", {key} {value}" for key, value in learned.about.items())
        say(f"calibrated {method} on {tokens} tokens of {about['text']}{said}: {path}")
    del loaded  # before the run loads the weights for itself
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return path
