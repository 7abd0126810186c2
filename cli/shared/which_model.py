"""The model of a command that was given none: which one, and why, in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from cli.shared.options import ModelOptions

    Options = TypeVar("Options", bound=ModelOptions)


def with_model(options: Options) -> Options:
    """The options with a model: the one that was asked for, or the best one that can be run here."""
    if options.model is not None:
        return options
    return replace(options, model=best_model(options.device, options.dtype, silent=options.silent))


def best_model(device: str = "auto", dtype: str = "auto", *, silent: bool) -> str:
    """The name of the best preset for a device, told on stderr unless `silent`."""
    import torch

    from cli.shared.render import say
    from shadowkv.models.default_model import default_model
    from shadowkv.models.loading import pick_device, pick_dtype

    device = pick_device(device)
    element_bytes = getattr(torch, pick_dtype(device, dtype)).itemsize
    memory_bytes = None if device == "cpu" else torch.cuda.mem_get_info(device)[1]
    chosen = default_model(memory_bytes, element_bytes)
    if not silent:
        say(f"no --model given: {chosen.name}, {chosen.why}")
    return chosen.name
