"""What a model and its config say about its attention layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from shadowkv.dims import Dims
from shadowkv.errors import SkvError


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """The window of each layer, None for a layer that sees everything; raises `SkvError` for other layers."""
    config = config.get_text_config()
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise SkvError(f"layers of kind {', '.join(sorted(kinds))} are not supported, only (sliding) attention")
    # Phi-3 declares a window wider than its context: such a layer sees everything.
    return [w if w is not None and w < config.max_position_embeddings else None for w in windows]


def dims_of(config: PreTrainedConfig, element_bytes: int, device: str = "cpu") -> Dims:
    """Geometry of the layers that a method serves, on a device of this type."""
    config = config.get_text_config()
    if getattr(config, "kv_lora_rank", None) is not None:
        raise SkvError("latent attention (MLA) is not supported: its cache holds no keys and values per head")
    served = tuple(i for i, window in enumerate(sliding_windows(config)) if window is None)
    return Dims(
        layers=len(served),
        q_heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        element_bytes=element_bytes,
        served=served,
        device=device,
    )


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, in the order in which they are run; raises `SkvError` where they are no list."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise SkvError(f"{type(model).__name__} has no list of decoder layers")
    return list(layers)
