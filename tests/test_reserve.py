"""Room for tokens that are known to come: taken at once, so that nothing moves while they do."""

from __future__ import annotations

import pytest
import torch
from test_graphs import FAST, FakeGraphs, batch, tensors
from test_methods import CASES
from tiny_models import random_prompt

from shadowkv.common.dims import Bytes
from shadowkv.contract.registry import parse_method
from shadowkv.engine.cache import MethodCache
from shadowkv.engine.engine import Engine

OFFLOAD_NONE = "shadowkv:rank=12,budget=64,outliers=2,window=8,offload=none,engine=fast"
LENGTHS = (158, 97)


def held(cache):
    return [x.data_ptr() for x in tensors([share.cache for share in cache._shares])]


@pytest.mark.parametrize("spec", [*FAST, OFFLOAD_NONE])
def test_nothing_moves_until_they_came_and_buffers_grow_after_that(tiny, spec):
    engine, method = Engine(tiny("llama"), prefill_chunk_tokens=128), parse_method(spec)
    plain, told = (batch(engine, method, LENGTHS) for _ in range(2))
    stream = random_prompt(300, batch=2, seed=5).split(1, dim=1)
    told.reserve(200)
    places = held(told)
    graphs = FakeGraphs(told)
    feed = graphs.stepper(engine)
    for number, token in enumerate(stream):
        torch.testing.assert_close(feed(token), engine.extend(plain, token), rtol=1e-4, atol=1e-4)
        if number == 199:
            assert held(told) == places
            assert graphs.captured == 1
    assert held(told) != places


@pytest.mark.parametrize("spec", [*FAST, OFFLOAD_NONE])
def test_room_that_is_there_is_not_taken_again_and_more_is_taken_to_the_token(tiny, spec):
    """So a plan stays true of what follows a prompt, and what comes on top is what those tokens take."""
    engine, method = Engine(tiny("llama"), prefill_chunk_tokens=128), parse_method(spec)
    cache = batch(engine, method, LENGTHS)
    before = cache.nbytes()
    cache.reserve(128)
    assert cache.nbytes() == before
    for tokens in (160, 2000):
        cache.reserve(tokens)
        token, pages = method.bytes_per_token(engine.dims), 2 * engine.dims.full_bytes_per_token
        more = Bytes(*(now - then for now, then in zip(cache.nbytes(), before, strict=True)))
        # Rows of a batch have room for the longest.
        assert 0 < more.device <= 2 * (tokens * token.device + pages)
        assert more.host <= 2 * tokens * token.host


@pytest.mark.parametrize("spec", CASES)
def test_any_method_decodes_the_same_with_room_and_without(tiny, spec, monkeypatch):
    engine, method = Engine(tiny("llama"), prefill_chunk_tokens=128, record_queries=True), parse_method(spec)
    prefill = engine.prefill(random_prompt(150, batch=2), method.prefill)
    told = []
    reserve = MethodCache.reserve

    def noting(cache, tokens):
        told.append(tokens)
        reserve(cache, tokens)

    monkeypatch.setattr(MethodCache, "reserve", noting)
    with_room = engine.decode(engine.replay(prefill, method), prefill.logits, 20)
    assert told == [19], "the last token is not fed"
    monkeypatch.setattr(MethodCache, "reserve", lambda cache, tokens: None)
    assert engine.decode(engine.replay(prefill, method), prefill.logits, 20) == with_room
