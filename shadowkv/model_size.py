"""How large a model is, by its config alone: parameters, layers, and the cache of layers that no method serves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from shadowkv.dims import Dims
from shadowkv.errors import SkvError
from shadowkv.method import require
from shadowkv.wording import one_line


@dataclass(frozen=True)
class ModelSize:
    """What a plan must know of a model beside the geometry of the layers that a method serves."""

    dims: Dims
    parameters: int
    step_parameters: int  # those that a decode step reads
    layers: int  # all of them
    vocab: int
    hidden: int  # channels between layers
    windows: tuple[int, ...] = ()  # of the sliding-window layers, which stay dense in their window

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dims.element_bytes

    def window_bytes(self, tokens: int) -> int:
        """Keys and values that the sliding-window layers hold of one sequence."""
        held = sum(min(window - 1, tokens) for window in self.windows)
        return 2 * held * self.dims.width * self.dims.element_bytes


def streamed_bytes(dims: Dims, hidden: int, tokens: int, *, with_queries: bool) -> int:
    """Device memory of a prompt that is computed layer by layer (`shadowkv.streamed`). hidden: see `ModelSize`.

    Two layers of it, what enters the next one, and the embeddings.
    """
    layer = replace(dims, layers=1)
    kept = layer.full_bytes_per_token + (layer.query_bytes_per_token if with_queries else 0)
    return 2 * tokens * (kept + hidden * dims.element_bytes)


class Parameters(NamedTuple):
    """How many a model has, and how many of them a decode step reads: of an embedding of its own, only few rows."""

    total: int
    per_step: int


def count_parameters(config: Any, *, trust_remote_code: bool = False) -> Parameters:
    """A model's parameters, without making them. Of a mixture of experts, a step counts as reading all.

    Raises `SkvError` for a config that is not a decoder's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise SkvError(
            f"a model of type {config.model_type} cannot be built as a decoder: {one_line(error)}"
        ) from error
    total = sum(p.numel() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return Parameters(total, total - (0 if tied else embedding.numel()))


def model_size(config: Any, element_bytes: int, *, device: str = "cuda", trust_remote_code: bool = False) -> ModelSize:
    """What the planner must know of a model on a device of this type.

    Raises `SkvError` for layers that no method serves.
    """
    from shadowkv.geometry import dims_of, sliding_windows

    counted = count_parameters(config, trust_remote_code=trust_remote_code)
    dims, windows = dims_of(config, element_bytes, device), sliding_windows(config)
    require(dims.layers > 0, "no layer of this model sees its whole context: there is nothing for a method to serve")
    return ModelSize(
        dims=dims,
        parameters=counted.total,
        step_parameters=counted.per_step,
        layers=len(windows),
        vocab=config.get_text_config().vocab_size,
        hidden=config.get_text_config().hidden_size,
        windows=tuple(window for window in windows if window is not None),
    )
