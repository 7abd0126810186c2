"""What only xKV promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import random_prompt, tiny_model

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Dims
from shadowkv.common.errors import SkvError
from shadowkv.engine.engine import Engine
from shadowkv.methods.compression.xkv import XKV
from shadowkv.methods.shadowkv.method import ShadowKV
from shadowkv.tensors import ops

TOKENS = 200


def recorded(model, tokens=TOKENS):
    layers = Engine(model).prefill(random_prompt(tokens)).recording.recorded
    return [layer.layer_kv(None, 0) for layer in layers]


def built(method, model):
    cache = method.new_state(Rope(model))
    for layer, kv in enumerate(recorded(model)):
        cache.ingest(layer, kv)
    cache.complete()
    return cache


def truncated_svd(layers, rank):
    """The best rank-`rank` approximation of [X_1|...|X_g], by a true SVD in fp64."""
    x = torch.cat([layer.transpose(1, 2).flatten(2) for layer in layers], dim=2)[0].double()
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank], s[rank:].square().sum()


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "llama-mha"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_factors_are_the_truncated_svd_of_the_layers_side_by_side(family, head_dim):
    model = tiny_model(family, head_dim=head_dim)
    cache, layers, rope = built(XKV(group=2, rank_k=24, rank_v=40), model), recorded(model), Rope(model)
    first, second = cache._groups
    expected = [(first, 0), (first, 1), (second, 0)]
    views = [state._factors for state in cache.layers.values()]
    assert all(view[:2] == group and view.place == place for view, (group, place) in zip(views, expected, strict=True))
    heads, positions = layers[0].k.shape[1], torch.arange(TOKENS)
    pre_rope = [rope.unrotate(i, kv.k, positions, TOKENS) for i, kv in enumerate(layers)]
    parts = {0: (pre_rope, 24), 1: ([kv.v for kv in layers], 40)}
    for which, (x, rank) in parts.items():
        for group, members, share in ((0, [0, 1], rank), (1, [2], rank // 2)):
            factors = cache._groups[group][which]
            expected, tail = truncated_svd([x[i] for i in members], share)
            got = torch.cat([factors.rebuild(p, heads).transpose(1, 2).flatten(2) for p in range(len(members))], 2)
            assert factors.coefficients.shape == (1, TOKENS, share)
            torch.testing.assert_close(got[0].double(), expected, rtol=1e-3, atol=1e-3)
            # Eckart-Young: the squared error is what the dropped singular values held.
            original = torch.cat([x[i].transpose(1, 2).flatten(2) for i in members], 2)[0].double()
            assert (got[0] - original).square().sum().item() == pytest.approx(tail.item(), rel=1e-3, abs=1e-4)


def test_what_is_rebuilt_of_chosen_tokens_is_what_is_rebuilt_of_all():
    cache = built(XKV(group=2, rank_k=24, rank_v=40), tiny_model("llama"))
    index = torch.stack([torch.randperm(TOKENS, generator=torch.Generator().manual_seed(head))[:9] for head in (0, 1)])
    for factors, place in itertools.product(cache._groups[0], (0, 1)):
        whole, weights = factors.rebuild(place, 2), torch.rand(1, 2, 3, TOKENS)
        torch.testing.assert_close(factors.rebuild_at(place, index[None]), ops.gather_tokens(whole, index[None]))
        torch.testing.assert_close(factors.weigh(weights, place), weights @ whole, rtol=1e-4, atol=1e-4)


def test_ranks_are_shares_of_the_width_unless_given():
    """Of four layers of Llama-3.1-8B, 512 and 768 of 4096; a group of two layers has half."""
    assert XKV().ranks(1024, 4) == (512, 768)
    assert XKV().ranks(192, 2) == (48, 72)
    assert XKV(rank_k=30).ranks(192, 2) == (15, 72)


def test_layers_that_are_alike_cost_one_layer():
    """Where the second layer repeats the first, a group needs the rank of one."""
    model = tiny_model("llama")
    kv, rope = recorded(model)[0], Rope(model)
    cache = XKV(group=2, rank_k=32, rank_v=32).new_state(rope)
    for layer in (0, 1):
        cache.ingest(layer, kv)
    cache.complete()
    torch.testing.assert_close(cache._groups[0][1].rebuild(1, 2), kv.v, rtol=1e-3, atol=1e-4)
    positions = torch.arange(TOKENS)
    keys = rope.rotate(1, cache._groups[0][0].rebuild(1, 2), positions, TOKENS)
    torch.testing.assert_close(keys, kv.k, rtol=1e-3, atol=1e-4)


def test_coefficients_are_held_once_for_all_layers_of_a_group():
    model = tiny_model("llama")
    held = built(XKV(group=3, rank_k=30, rank_v=33), model).nbytes()
    assert held.device == 4 * (TOKENS * (30 + 33) + (30 + 33) * 3 * 32)


def test_ranks_beyond_a_group_are_refused():
    dims = Dims(layers=6, q_heads=4, kv_heads=2, head_dim=16, element_bytes=2)
    with pytest.raises(SkvError, match="rank_v=129 exceeds the width of 4 layers of this model, 128"):
        XKV(rank_k=128, rank_v=129).check(dims)
    XKV(rank_k=128, rank_v=128).check(dims)


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "llama-mha", "glm"])
def test_chosen_chunks_of_one_layer_are_those_of_shadowkv(family):
    """Groups of one layer and full ranks: the same chunks, the same keys, as long as new tokens stay exact."""
    model = tiny_model(family)
    engine = Engine(model)
    rank = engine.dims.width
    settings = {"budget": 48, "chunk": 8, "local": 2, "outliers": 3}
    chosen = XKV(group=1, rank_k=rank, rank_v=engine.dims.width, select=True, **settings)
    prefill = engine.prefill(random_prompt(TOKENS))
    outputs = []
    for method in (chosen, ShadowKV(rank=rank, **settings)):
        cache = engine.replay(prefill, method)
        outputs.append(torch.stack([engine.extend(cache, token[None, None]) for token in random_prompt(12, seed=4)[0]]))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


def test_a_step_reads_what_it_is_said_to_read(monkeypatch):
    model = tiny_model("llama")
    engine, method = Engine(model), XKV(group=2, rank_k=20, rank_v=24, select=True, budget=48, local=2, outliers=3)
    cache = engine.replay(engine.prefill(random_prompt(TOKENS)), method)
    read = []
    attend = ops.attend

    def counting(q, segments, scaling):
        read.append(sum(k.shape[2] for k, _ in segments))
        return attend(q, segments, scaling)

    monkeypatch.setattr(ops, "attend", counting)
    engine.extend(cache, torch.tensor([[5]]))
    assert set(read) == {method.attended_tokens(engine.dims, TOKENS, 1)}
    assert method.attended_tokens(engine.dims, TOKENS) == 48 + 3 * 8 + 2 * 8


def test_a_budget_applies_only_where_chunks_are_chosen():
    assert XKV().with_budget(256) is None
    dims = Dims(4, 4, 2, 64, 4)
    assert 240 <= XKV(select=True).with_budget(256).attended_tokens(dims, 4000) <= 256
