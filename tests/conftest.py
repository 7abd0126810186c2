from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from tiny_models import tiny_model
from transformers import PreTrainedModel

from shadowkv.loading import load_tokenizer
from shadowkv.presets import find_preset
from shadowkv.resolving import ModelSource


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], PreTrainedModel]:
    """Tiny models by family, each built once and never changed."""
    return lru_cache(maxsize=None)(tiny_model)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte tokenizer, saved as a user's local model folder would be."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
