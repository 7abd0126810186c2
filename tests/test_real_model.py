"""The truth on a real model: SmolLM2-135M-Instruct, where it is pulled."""

from __future__ import annotations

import pytest
import torch

from evals.niah.task import Niah
from shadowkv.contract.registry import methods
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full
from shadowkv.models.loading import load_model
from shadowkv.models.packs import pack_path
from shadowkv.models.resolving import resolve

pytestmark = pytest.mark.skipif(pack_path("smollm2-135m") is None, reason="smollm2-135m is not pulled")


@pytest.fixture(scope="module")
def loaded():
    return load_model(resolve("smollm2-135m"), device="cpu")


@pytest.fixture(scope="module")
def example(loaded):
    task = Niah(lengths=(1024,), depths=(50.0,), haystack_spec="synthetic")
    return next(task.examples(loaded.tokenizer))


def test_full_attention_finds_the_needle_and_equals_generate(loaded, example):
    ids = torch.tensor([example.input_ids])
    tokens = Engine(loaded.model).generate(ids, Full(), 16, loaded.stop_ids)[0]
    assert example.references[0] in loaded.tokenizer.decode(tokens)
    loaded.model.set_attn_implementation("sdpa")
    stock = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    answer = [t for t in stock[0, ids.shape[1] :].tolist() if t not in loaded.stop_ids]
    assert tokens == answer


@pytest.mark.parametrize("name", methods())
def test_lossless_settings_follow_full_attention(loaded, example, name):
    engine = Engine(loaded.model, record_queries=True)
    prefill = engine.prefill(torch.tensor([example.input_ids]))
    method = methods()[name]().lossless(engine.dims, 1024 + 32)
    if method is None:
        pytest.skip(f"{name} declares no lossless setting")
    exact, cache = engine.replay(prefill, Full()), engine.replay(prefill, method)
    token = prefill.logits.argmax(dim=-1, keepdim=True)
    for _ in range(9):
        expected, got = engine.extend(exact, token), engine.extend(cache, token)
        assert ((got - expected).norm() / expected.norm()).item() < 1e-4
        token = expected.argmax(dim=-1, keepdim=True)
