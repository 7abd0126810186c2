"""What only xKV promises."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_prompt, tiny_model

from shadowkv.engine import Engine
from shadowkv.errors import SkvError
from shadowkv.method import Dims
from shadowkv.methods.xkv import XKV
from shadowkv.rope import Rope

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
    """The best centred rank-`rank` approximation of [X_1|...|X_g], by a true SVD in fp64."""
    x = torch.cat([layer.transpose(1, 2).flatten(2) for layer in layers], dim=2)[0].double()
    mean = x.mean(dim=0, keepdim=True)
    u, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] + mean, s[rank:].square().sum()


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "llama-mha"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_factors_are_the_truncated_svd_of_the_layers_side_by_side(family, head_dim):
    model = tiny_model(family, head_dim=head_dim)
    cache, layers, rope = built(XKV(group=2, rank_k=24, rank_v=40), model), recorded(model), Rope(model)
    first, second = cache._groups
    expected = [(first, 0), (first, 1), (second, 0)]
    assert all(m.group is g and m.place == p for m, (g, p) in zip(cache._members.values(), expected, strict=True))
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


def test_layers_that_are_alike_cost_one_layer():
    """Where the second layer repeats the first, a group needs the rank of one."""
    model = tiny_model("llama")
    kv, rope = recorded(model)[0], Rope(model)
    cache = XKV(group=2, rank_k=32, rank_v=32).new_state(rope)
    for layer in (0, 1):
        cache.ingest(layer, kv)
    cache.complete()
    torch.testing.assert_close(cache._groups[0].values.rebuild(1, 2), kv.v, rtol=1e-3, atol=1e-4)
    positions = torch.arange(TOKENS)
    keys = rope.rotate(1, cache._groups[0].keys.rebuild(1, 2), positions, TOKENS)
    torch.testing.assert_close(keys, kv.k, rtol=1e-3, atol=1e-4)


def test_coefficients_are_held_once_for_all_layers_of_a_group():
    model = tiny_model("llama")
    held = built(XKV(group=3, rank_k=30, rank_v=33), model).nbytes()
    assert held.device == 4 * (TOKENS * (30 + 33) + (30 + 33 + 2) * 3 * 32)


def test_ranks_beyond_a_group_are_refused():
    dims = Dims(layers=6, q_heads=4, kv_heads=2, head_dim=16, element_bytes=2)
    with pytest.raises(SkvError, match="rank_v=129 exceeds the width of 4 layers of this model, 128"):
        XKV(rank_k=128, rank_v=129).check(dims)
    XKV(rank_k=128, rank_v=128).check(dims)
