"""A model by its name, for users of the library."""

from __future__ import annotations

from shadowkv.models.loading import LoadedModel, load_model
from shadowkv.models.resolving import resolve


def load(
    name: str, *, device: str = "auto", dtype: str = "auto", offline: bool = False, trust_remote_code: bool = False
) -> LoadedModel:
    """The model that `--model name` means: a preset, a folder, a Hub id or a GGUF file; `.model` and `.tokenizer`.

    device auto is the GPU if there is one; dtype auto is fp32 on a CPU and bf16 on a GPU. Packs have to be pulled
    (`skv pull`); the Hub's files are downloaded unless `offline`. Raises `SkvError` where it cannot be had.
    """
    source = resolve(name, offline=offline)
    return load_model(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
