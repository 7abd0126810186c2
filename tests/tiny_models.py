"""Tiny random models of every family the engine claims to drive, built from configs: no files, no network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from shadowkv.anatomy.forward import cache_argument
from shadowkv.contract.method import Method

VOCAB = 199
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    # Untrained weights at the usual 0.02 give nearly uniform attention, under which every method looks right.
    "initializer_range": 0.2,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 256,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "glm": ("glm", {"attention_bias": True}),
    "glm4": ("glm4", {}),
    "phi3-longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 256}),
    "gemma3": ("gemma3_text", {"layer_types": _SLIDING, "sliding_window": 48, "query_pre_attn_scalar": 20}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 64}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """A random model of `family` in eval mode."""
    model_type, changes = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **changes, **more})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return model.eval().requires_grad_(False)


def geometry_model(group: int, head_dim: int, **more: Any) -> PreTrainedModel:
    """A tiny Llama of two KV heads with `group` query heads each."""
    heads = 2 * group
    shape = {"num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": head_dim, "hidden_size": 16 * heads}
    return tiny_model("llama", **shape, **more)


def random_prompt(tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Token ids [batch, tokens] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, tokens), generator=generator)


def through(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """The argument that takes a cache in a call of `model` or `model.generate`, in this version of transformers."""
    return {cache_argument(type(model).forward): cache}


def at_its_bound(method: Method) -> Method:
    """The method with what depends on the prompt at the largest number, which is what a plan counts."""
    changed: Any = method
    if getattr(method, "energy", 0):  # the rank
        changed = replace(changed, energy=1.0)
    return replace(changed, ratio=1.0) if hasattr(method, "ratio") else changed  # columns that two lists share
