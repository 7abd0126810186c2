"""Random models of a few kB with a tokenizer of bytes: with them every stage runs on a CPU in seconds."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

_KV_HEADS = MappingProxyType({"tiny": 2, "tiny4": 4})


def tiny_models(folder: Path) -> dict[str, str]:
    """Where the models are in `folder`, by the names that stages have for them."""
    return {name: str(folder / name) for name in _KV_HEADS}


def write_tiny_models(folder: Path) -> dict[str, str]:
    """The same, after they were written if they were not there."""
    for name, kv_heads in _KV_HEADS.items():
        if not (folder / name / "config.json").is_file():
            _write(folder / name, kv_heads)
    return tiny_models(folder)


def _write(target: Path, kv_heads: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from shadowkv.models.loading import load_tokenizer
    from shadowkv.models.presets import find_preset
    from shadowkv.models.resolving import ModelSource

    tokenizer = load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.2,  # at the usual 0.02 attention is nearly uniform, under which every method looks right
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
