"""Numbers that overflow their type: an answer made of them is none, and where they begin is worth a line."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shadowkv.anatomy.geometry import find_layers
from shadowkv.common.errors import NotFiniteError
from shadowkv.engine.engine import Engine


def where_not_finite(engine: Engine, input_ids: Tensor, failure: NotFiniteError) -> NotFiniteError:
    """`failure` with the first decoder layer whose output is not finite, as the model reads input_ids [1,n] densely.

    input_ids: the prompt and the answer as far as it went.
    """
    layers, broken = find_layers(engine.model), set[int]()

    def look(number: int, layer: nn.Module, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if not bool(torch.isfinite(hidden).all()):
            broken.add(number)

    hooks = [layer.register_forward_hook(partial(look, number)) for number, layer in enumerate(layers)]
    try:
        for recorded in engine.stream(input_ids).recorded:
            recorded.layer_kv(None, 0)
    finally:
        for hook in hooks:
            hook.remove()
    if broken:
        return failure.first_in(f"layer {min(broken)}")
    return failure.first_in("the method" if failure.answer else "the output head")
