"""What a model's config says about its layers, and where they are."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from shadowkv.common.dims import KVLayer
from shadowkv.common.errors import SkvError
from shadowkv.common.wording import one_line


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """The window of each layer that keeps keys and values, None for one that sees everything.

    Raises `SkvError` for layers of another kind.
    """
    config = config.get_text_config()
    if getattr(config, "kv_lora_rank", None) is not None:
        raise SkvError("latent attention (MLA) is not supported: its cache holds no keys and values per head")
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise SkvError(f"layers of kind {', '.join(sorted(kinds))} are not supported, only (sliding) attention")
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # some configs describe no cache, each in its own way
        raise SkvError(f"a model of type {config.model_type} has no cache per layer: {one_line(error)}") from error
    # Phi-3 declares a window wider than its context: such a layer sees everything.
    context = getattr(config, "max_position_embeddings", None)
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    return [w if w is not None and (context is None or w < context) else None for w in windows]


def declared_layers(config: PreTrainedConfig) -> list[KVLayer]:
    """Layers as the config's usual fields describe them: for a model that cannot be run to see."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return [KVLayer(heads, kv_heads, head_dim, window) for window in sliding_windows(config)]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, in the order in which they are run; raises `SkvError` where they are no list."""
    layers = find_layers(model)
    if not layers:
        raise SkvError(f"{type(model).__name__} has no list of decoder layers")
    return layers


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """`decoder_layers`, or none."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    return next((list(layers) for layers in lists if len(layers) == count), [])
