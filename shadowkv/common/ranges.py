"""Names for stretches of a decode step, seen by torch's profiler and free where none runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn
from torch.autograd import profiler
from transformers import PreTrainedModel

P = ParamSpec("P")
T = TypeVar("T")
PREFIX = "skv::"


def ranged(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Report the function's time to a running profiler as `skv::<name>`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            if not profiler._is_profiler_enabled:  # torch keeps it for exactly this: one look instead of a range
                return function(*args, **kwargs)
            with profiler.record_function(PREFIX + name):
                return function(*args, **kwargs)

        return run

    return decorate


@contextmanager
def module_ranges(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, the model's projections, MLPs and head report their times as well, by hooks on them."""
    hooks = []
    for module, name in _named_parts(model):
        enter, leave = _hooks(PREFIX + name)
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _named_parts(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    for layer in model.get_decoder().layers:
        for part in layer.children():
            if hasattr(part, "layer_idx"):  # transformers gives it to attention, which looks its cache up by it
                yield from ((m, "projections") for m in part.modules() if isinstance(m, nn.Linear))
            elif any(parameter.dim() > 1 for parameter in part.parameters()):  # not a norm
                yield part, "mlp"
    yield model.get_output_embeddings(), "head"


def _hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    running: list[Any] = []

    def enter(*_: object) -> None:
        running.append(profiler.record_function(name).__enter__())

    def leave(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    return enter, leave
