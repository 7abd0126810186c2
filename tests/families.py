"""Tiny random models of every decoder family of transformers that takes a cache, by the name of its config."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import methods
from shadowkv.engine.engine import Engine

VOCAB = 211
_MIXED = ["sliding_attention", "full_attention"] * 2
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
}
_WINDOW = {"sliding_window": 32, "layer_types": _MIXED}
_OWN_HEADS = {"num_key_value_heads": None, "head_dim": None}  # configs that know one number of heads only

# By config name: what it needs beside the usual fields; None takes one of those away.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": _WINDOW | _EXPERTS,
    "apertus": {},
    "arcee": {},
    "aria_text": _EXPERTS,
    "bamba": {},
    "biogpt": _OWN_HEADS,
    "bitnet": {},
    "bloom": {},
    "codegen": _OWN_HEADS | {"rotary_dim": 8, "n_ctx": 2048},
    "cohere": {},
    "cohere2": _WINDOW,
    "cohere2_moe": _EXPERTS,
    "ctrl": _OWN_HEADS,
    "cwm": {},
    "deepseek_v2": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "diffllama": {},
    "doge": {"num_key_value_heads": 4},
    "dots1": _EXPERTS,
    "ernie4_5": {},
    "ernie4_5_moe": _EXPERTS,
    "exaone": {},
    "exaone4": _WINDOW,
    "exaone_moe": _EXPERTS,
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon_mamba": {},
    "flex_olmo": _EXPERTS,
    "gemma": {},
    "gemma2": _WINDOW,
    "gemma3_text": _WINDOW,
    "gemma3n_text": _WINDOW
    | {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.0] * 6,
        "laurel_rank": 8,
    },
    "gemma4_text": _WINDOW
    | {
        "global_head_dim": 32,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 0,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": _EXPERTS,
    "gpt2": _OWN_HEADS,
    "gpt_bigcode": _OWN_HEADS,
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": _WINDOW | _EXPERTS,
    "gptj": _OWN_HEADS | {"rotary_dim": 8},
    "granite": {},
    "granitemoe": _EXPERTS,
    "granitemoeshared": _EXPERTS,
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": _EXPERTS,
    "hyperclovax": {},
    "jais2": {},
    "jamba": {},
    "jetmoe": _EXPERTS | {"kv_channels": 16},
    "laguna": _EXPERTS,
    "llama": {},
    "llama4_text": _EXPERTS
    | {"no_rope_layers": [1, 0, 1, 0], "layer_types": ["full_attention"] * 4, "intermediate_size_mlp": 96},
    "mamba": {},
    "minicpm3": {},
    "minimax_m2": _EXPERTS,
    "ministral": {},
    "ministral3": {},
    "mistral": {"sliding_window": None},
    "mixtral": _EXPERTS,
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmoe": _EXPERTS,
    "opt": _OWN_HEADS | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "phimoe": _EXPERTS,
    "qwen2": {},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": _EXPERTS,
    "recurrent_gemma": {},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "solar_open": _EXPERTS,
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": _WINDOW,
    "xglm": _OWN_HEADS,
    "zamba": {},
}


def known(family: str) -> bool:
    """Whether the installed transformers has it: some came after the oldest one that is supported."""
    return family in CONFIG_MAPPING_NAMES


def family_model(family: str, **more: Any) -> PreTrainedModel:
    """A random model of `family` in eval mode, whose weights are not those of any initialisation."""
    fields = {key: value for key, value in (_SHAPE | FAMILIES[family] | more).items() if value is not None}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)


def own_tokens(model: PreTrainedModel, ids: torch.Tensor, count: int) -> list[int]:
    """What plain `generate` goes on with, without any stop token."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 2
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return list(made[0, ids.shape[1] :].tolist())


class Verdict(NamedTuple):
    """What skv does with a family: the methods whose lossless settings give the model's own answer, and why not others.

    wrong: methods that gave another one, which must be none. refused: by method, or by "" for the family as a whole.
    """

    exact: list[str]
    wrong: list[str]
    refused: dict[str, str]


def judge(model: PreTrainedModel, only: Collection[str] | None = None) -> Verdict:
    """Every method (or only these) on a prompt of three chunks and eight tokens of an answer."""
    ids = torch.randint(20, VOCAB, (1, 100), generator=torch.Generator().manual_seed(3))
    verdict = Verdict([], [], {})
    try:
        engine = Engine(model, prefill_chunk_tokens=40, record_queries=True)
    except SkvError as error:
        verdict.refused[""] = str(error)
        return verdict
    own = own_tokens(model, ids, 8)
    for name, kind in methods().items():
        lossless = kind().lossless(engine.dims, 200)
        if lossless is None or (only is not None and name not in only):
            continue
        try:
            lossless.check(engine.dims)
            (verdict.exact if engine.generate(ids, lossless, 8)[0] == own else verdict.wrong).append(name)
        except SkvError as error:
            verdict.refused[name] = str(error)
    return verdict


def row(family: str, verdict: Verdict) -> str:
    """A family's line of docs/model-families.md."""
    if "" in verdict.refused:
        return f"| `{family}` | refused | {verdict.refused['']} |"
    if not verdict.refused:
        return f"| `{family}` | exact | all methods |"
    reasons: dict[str, list[str]] = {}
    for name, reason in verdict.refused.items():
        reasons.setdefault(reason.partition(": ")[2] or reason, []).append(f"`{name}`")
    said = "; ".join(f"without {', '.join(names)}: {reason}" for reason, names in reasons.items())
    return f"| `{family}` | exact | {said} |"


DOCUMENT = Path(__file__).parent.parent / "docs" / "model-families.md"


def document() -> str:
    """docs/model-families.md, as the installed transformers has it."""
    rows = [row(family, judge(family_model(family))) for family in FAMILIES]
    return "\n".join([HEAD.format(version=transformers.__version__), *rows, ""])


HEAD = """# Model families

What `skv` does with each decoder family of transformers {version}, by the name in its config's `model_type`: found by
running a tiny random model of each (`tests/test_families.py`; `python tests/families.py` writes this page anew).

**exact**: with the lossless setting of a method, the tokens are those of the model's own `generate`; keys that are
un-rotated are those that the model had before it turned them. **refused**: `skv` says so in one line, with exit code 2,
before anything is computed; `skv plan` and `--dry-run` too. A family that is not listed is treated alike: its layers
are looked at, and the loaded model is compared with itself, before anything is scored.

| family | | |
|---|---|---|"""

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    DOCUMENT.write_text(document(), encoding="utf-8")
