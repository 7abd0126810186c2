"""Prompts computed layer by layer: the numbers of a prefill, without ever holding one."""

from __future__ import annotations

import gc

import pytest
import torch
from test_methods import CASES
from tiny_models import FAMILIES, random_prompt, tiny_model

from shadowkv.anatomy.geometry import decoder_layers
from shadowkv.anatomy.survey import survey
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import DecodeCache
from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.engine.streamed import StreamedPrompt, _Chunk
from shadowkv.methods.full.method import Full
from shadowkv.tensors.stacking import Stackable

TOKENS, STEPS = 300, 6


@pytest.fixture
def engine(tiny):
    return Engine(tiny("llama"), prefill_chunk_tokens=64, record_queries=True)


def hooks(model):
    return sum(len(layer._forward_pre_hooks) for layer in decoder_layers(model))


def forced(engine, cache):
    """Logits after each of a few tokens."""
    stream = random_prompt(STEPS, seed=7)
    return torch.stack([engine.extend(cache, column) for column in stream.split(1, dim=1)])


@pytest.mark.parametrize(
    "spec", [*CASES, "full+minference:vertical=40,slash=60", "quest:budget=64+minference:blocks=2"]
)
def test_a_streamed_prompt_is_that_of_a_prefill_to_the_bit(engine, spec):
    method, ids = parse_method(spec), random_prompt(TOKENS)
    prompt = engine.stream(ids, method.prefill)
    streamed = engine.adopt(prompt, method)
    prefill = engine.prefill(ids, method.prefill)
    assert torch.equal(prompt.logits, prefill.logits)
    assert torch.equal(forced(engine, streamed), forced(engine, engine.replay(prefill, method)))


def storages(thing, found):
    """Bytes of every storage that is reachable from here, by address."""
    if isinstance(thing, torch.Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for item in thing.values():
            storages(item, found)
    elif isinstance(thing, list | tuple):
        for item in thing:
            storages(item, found)
    elif isinstance(thing, Stackable | DecodeCache):
        storages(vars(thing), found)
    return found


@pytest.mark.parametrize("spec", CASES)
def test_what_is_built_of_a_streamed_prompt_keeps_nothing_else_of_it(engine, spec):
    cache = engine.adopt(engine.stream(random_prompt(TOKENS)), parse_method(spec))
    for share in cache._shares:
        held = storages(share.cache, {})
        assert held
        assert sum(held.values()) <= 1.01 * sum(share.cache.nbytes())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_streamed(tiny, family):
    engine = Engine(tiny(family), prefill_chunk_tokens=128)
    method = parse_method("shadowkv:rank=12,budget=64,outliers=2,window=8")
    prompts = torch.cat([random_prompt(TOKENS, seed=s) for s in range(2)])
    prompt = engine.stream(prompts)
    streamed = engine.adopt(prompt, method)
    prefill = engine.prefill(prompts)
    kept = engine.replay(prefill, method)
    assert torch.equal(prompt.logits, prefill.logits)
    tokens = [engine.decode(cache, prefill.logits, 8) for cache in (streamed, kept)]
    assert tokens[0] == tokens[1]
    assert streamed.nbytes() == kept.nbytes()


@pytest.mark.parametrize("ahead", [0, 1])
def test_few_layers_are_held_at_a_time(tiny, ahead):
    model, ids = tiny("llama"), random_prompt(TOKENS)
    prompt = StreamedPrompt(model, survey(model).layers, ids, [100, 200, TOKENS], ahead=ahead)
    held = []
    for layer in prompt.recorded:
        layer.layer_kv(None, 0)
        held.append(sum(bool(x.nbytes()) for x in prompt._layers))
    assert held == [*[ahead] * (len(held) - ahead), *[0] * ahead]


@pytest.mark.parametrize("ahead", [0, 1])
def test_whoever_takes_layers_holds_none_while_others_are_computed(engine, monkeypatch, ahead):
    monkeypatch.setattr(Full, "new_layer", lambda self, layer, kv, rope: None)
    prompt = StreamedPrompt(engine.model, engine.layers, random_prompt(TOKENS), [100, 200, TOKENS], ahead=ahead)
    of_a_layer = 2 * TOKENS * 16 * 4  # KV heads, channels, bytes
    dense = []

    def stores():
        found = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
        return {store.data_ptr() for store in found if store.nbytes() == of_a_layer}

    gc.collect()
    others = stores()  # of tests before this one

    def count(*_):
        dense.append(len(stores() - others) / 2)

    watched = [layer.mlp.register_forward_hook(count) for layer in decoder_layers(engine.model)]
    engine.adopt(prompt, Full())
    for hook in watched:
        hook.remove()
    assert max(dense) == 1 + ahead
    assert dense[0] == 1, "there is room for all chunks from the first one on"


@pytest.mark.parametrize("ahead", [0, 1])
def test_layers_under_way_change_nothing(engine, ahead):
    ids = random_prompt(TOKENS)
    prompt = StreamedPrompt(
        engine.model, engine.layers, ids, [64, 128, 192, 256, TOKENS], record_queries=True, ahead=ahead
    )
    streamed = [layer.layer_kv(None, 0) for layer in prompt.recorded]
    prefill = engine.prefill(ids)
    for mine, layer in zip(streamed, prefill.recording.recorded, strict=True):
        theirs = layer.layer_kv(None, 0)
        assert all(torch.equal(x, y) for x, y in zip(mine[:3], theirs[:3], strict=True))
        assert torch.equal(mine.q_all, theirs.q_all)
    assert torch.equal(prompt.logits, prefill.logits)


def test_two_prompts_take_turns(engine):
    ids = [random_prompt(TOKENS, seed=s) for s in range(2)]
    prompts = [engine.stream(x) for x in ids]
    layers = list(zip(*(prompt.recorded for prompt in prompts), strict=True))
    for both in layers:
        for layer in both:
            layer.layer_kv(None, 0)
    for prompt, x in zip(prompts, ids, strict=True):
        assert torch.equal(prompt.logits, engine.prefill(x).logits)


def test_a_prompt_that_is_done_or_given_up_leaves_nothing_on_the_model(engine):
    model = engine.model
    engine.adopt(engine.stream(random_prompt(TOKENS)), parse_method("full"))
    assert hooks(model) == 0
    prompt = engine.stream(random_prompt(TOKENS))
    prompt.recorded[0].layer_kv(None, 0)
    assert hooks(model) == len(decoder_layers(model)) - 1
    prompt.close()
    assert hooks(model) == 0
    prompt = engine.stream(random_prompt(TOKENS))
    prompt.recorded[0].layer_kv(None, 0)
    del prompt
    gc.collect()
    assert hooks(model) == 0


def held_chunks():
    gc.collect()
    return sum(type(x) is _Chunk for x in gc.get_objects())


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_prompt_that_is_given_up_lets_go_of_all_it_held(engine, asked):
    prompt = engine.stream(random_prompt(TOKENS))
    kept = [layer.layer_kv(None, 0) for layer in prompt.recorded[:asked]]
    assert len(kept) == asked
    assert held_chunks() == 5
    del prompt
    assert held_chunks() == 0


def test_a_cache_that_cannot_be_built_takes_its_prompt_with_it(engine, monkeypatch):
    def fails(self, layer, kv, rope):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Full, "new_layer", fails)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        engine.adopt(engine.stream(random_prompt(TOKENS)), Full())
    assert held_chunks() == 0
    assert hooks(engine.model) == 0


def test_a_failure_between_layers_ends_the_prompt(engine, monkeypatch):
    prompt = engine.stream(random_prompt(TOKENS))
    layers = prompt.recorded
    layers[0].layer_kv(None, 0)
    last = decoder_layers(engine.model)[2]

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(last, "forward", fails)
        layers[1].layer_kv(None, 0)
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            layers[2].layer_kv(None, 0)
    assert hooks(engine.model) == 0
    with pytest.raises(ValueError, match="given up"):
        layers[2].layer_kv(None, 0)
    method = parse_method("full")
    prompt = engine.stream(random_prompt(TOKENS))
    engine.adopt(prompt, method)
    assert torch.equal(prompt.logits, engine.prefill(random_prompt(TOKENS)).logits)


def test_what_is_no_prompt_is_refused(engine):
    with pytest.raises(SkvError, match="a prompt must be token ids"):
        engine.stream(torch.zeros(0, 4, dtype=torch.long))


@pytest.mark.gpu
def test_caches_built_beside_a_prompt_on_its_way_are_those_built_after_it():
    model = tiny_model("llama", dtype=torch.bfloat16).cuda()
    engine = Engine(model, prefill_chunk_tokens=512, record_queries=True)
    ids = random_prompt(4000, seed=3).cuda()
    for spec in ("full", "shadowkv:rank=12,budget=64,outliers=2,window=8", "quest:budget=64", "h2o:budget=64"):
        method = parse_method(spec)
        for _ in range(3):  # what one cache let go of is used by the next
            prompt = engine.stream(ids)
            streamed = engine.adopt(prompt, method)
            prefill = engine.prefill(ids)
            kept = engine.adopt(prefill.recording, method)
            assert torch.equal(prompt.logits, prefill.logits)
            tokens = [engine.decode(cache, prefill.logits, 20) for cache in (streamed, kept)]
            assert tokens[0] == tokens[1]
