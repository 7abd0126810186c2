"""How large a model is, by its config alone: parameters, layers, and the cache of layers that no method serves."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from shadowkv.common.dims import Dims, KVLayer
from shadowkv.common.errors import SkvError
from shadowkv.common.wording import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SAMPLE_SIZES = {"vocab_size": 512, "intermediate_size": 64, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class ModelSize:
    """What a plan must know of a model beside the geometry of the layers that a method serves."""

    dims: Dims
    parameters: int
    step_parameters: int  # those that a decode step reads
    layers: tuple[KVLayer, ...]  # all of them
    vocab: int
    hidden: int  # channels between layers

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dims.element_bytes

    def require_served(self) -> None:
        """Raise `SkvError` where methods have nothing to do."""
        if not self.dims.layers:
            raise SkvError("no layer of this model sees its whole context: there is nothing for a method to serve")

    def dense_bytes(self, tokens: int) -> int:
        """Keys and values that the layers which no method serves hold of one sequence: a window, or all."""
        return sum(
            layer.token_bytes(self.dims.element_bytes) * (min(layer.window - 1, tokens) if layer.window else tokens)
            for layer in self.layers
            if not layer.served
        )


def streamed_bytes(dims: Dims, hidden: int, tokens: int, *, with_queries: bool) -> int:
    """Device memory of a prompt that is computed layer by layer (`shadowkv.engine.streamed`). hidden: see `ModelSize`.

    Two layers of it, what enters the next one, and the embeddings.
    """
    layer = replace(dims, layers=1)
    kept = layer.full_bytes_per_token + (layer.query_bytes_per_token if with_queries else 0)
    return 2 * tokens * (kept + hidden * dims.element_bytes)


class Parameters(NamedTuple):
    """How many a model has, and how many of them a decode step reads: of an embedding of its own, only few rows."""

    total: int
    per_step: int


def blueprint(config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without memory for its weights. Raises `SkvError` for a config that is not a decoder's."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        # Experts have kernels for bf16 alone where nothing can be computed. The model notes in its config how it is to
        # attend, and that one is the caller's.
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                deepcopy(config), dtype=torch.bfloat16, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a config can contradict itself in more ways than its model tells apart
        raise SkvError(
            f"a model of type {config.model_type} cannot be built as a decoder: {one_line(error)}"
        ) from error
    return model.eval()


def _layers(model: PreTrainedModel, config: Any, trust_remote_code: bool) -> tuple[KVLayer, ...]:
    """Layers of a model without weights: as it runs, as a sample of it runs, or else as its config declares them."""
    from shadowkv.anatomy.geometry import declared_layers
    from shadowkv.anatomy.survey import CannotRunError, survey

    try:
        return survey(model).layers
    except CannotRunError:
        declared = tuple(declared_layers(config))
    small = _sample(config, declared, trust_remote_code)
    if small is None:
        return declared
    try:
        alike = {layer.window is None: layer for layer in survey(small).layers}
    except CannotRunError:
        if _runs(small):
            raise
        return declared  # the sample is to blame; the loaded model will tell
    return tuple(replace(alike.get(layer.window is None, layer), window=layer.window) for layer in declared)


def _sample(config: Any, layers: Sequence[KVLayer], trust_remote_code: bool) -> PreTrainedModel | None:
    """The first layers of this kind with small matrices, which can be run; None where it cannot be made so small.

    For what computes in ways that the meta device cannot follow, such as some routers of experts, and the rotary
    embeddings of older versions.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kinds = [layer.window is None for layer in layers]
    first = max(kinds.index(kind) for kind in set(kinds)) + 1
    small = deepcopy(config)
    for name, value in vars(small).items():
        if isinstance(value, list) and len(value) == len(layers):
            setattr(small, name, value[:first])
    for name, most in {**_SAMPLE_SIZES, "num_hidden_layers": first}.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, min(getattr(small, name), most))
    small.pad_token_id = small.bos_token_id = small.eos_token_id = 0
    try:
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            small, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
        )
    except Exception:  # sizes that depend on each other in ways of this family's own
        return None
    return made.eval()


def _runs(model: PreTrainedModel) -> bool:
    """Whether a model runs at all, with a cache of its own."""
    import torch

    try:
        model(torch.zeros(1, 2, dtype=torch.long), use_cache=True)
    except Exception:  # whatever its code raises, it does not
        return False
    return True


def count_parameters(model: PreTrainedModel) -> Parameters:
    """A model's parameters. Of a mixture of experts, a step counts as reading all."""
    total = sum(p.numel() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return Parameters(total, total - (0 if tied else embedding.numel()))


def model_size(config: Any, element_bytes: int, *, device: str = "cuda", trust_remote_code: bool = False) -> ModelSize:
    """What is to be known of a model on a device of this type. Raises `SkvError` for one that cannot be driven."""
    from shadowkv.anatomy.rope import rotary_module
    from shadowkv.anatomy.survey import served_dims

    model = blueprint(config, trust_remote_code=trust_remote_code)
    counted = count_parameters(model)
    layers = _layers(model, config, trust_remote_code)
    dims = served_dims(layers, element_bytes, device)
    return ModelSize(
        dims=replace(dims, rotary=rotary_module(model) is not None),
        parameters=counted.total,
        step_parameters=counted.per_step,
        layers=layers,
        vocab=config.get_text_config().vocab_size,
        hidden=config.get_text_config().hidden_size,
    )
