"""What only Quest promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, random_prompt

from shadowkv.common.dims import Dims
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import LayerKV
from shadowkv.engine.engine import Engine
from shadowkv.methods.quest.method import Quest
from shadowkv.methods.quest.paged import PagedLayer, page_extremes
from shadowkv.tensors import ops

HEADS, GROUP, DIM, PROMPT = 2, 2, 8, 70


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream(method, steps):
    """Outputs of `steps` single-token calls, and all keys and values and the queries that made them."""
    k, v = rand(1, HEADS, PROMPT + steps, DIM, seed=1), rand(1, HEADS, PROMPT + steps, DIM, seed=2)
    q = 3 * rand(1, HEADS * GROUP, steps, DIM, seed=3)
    kv = LayerKV(k[:, :, :PROMPT], v[:, :, :PROMPT], q[:, :, :0], 0.3)
    state = method.new_layer(5, kv, rope=None)
    new = [slice(PROMPT + t, PROMPT + t + 1) for t in range(steps)]
    outs = [state.attend(q[:, :, t : t + 1], k[:, :, s], v[:, :, s], 0.3) for t, s in enumerate(new)]
    return outs, k, v, q


def expected(method, k, v, q, tokens, head):
    """Attention of one query head over the pages that its bound chooses, by the definition."""
    page, kv_head = method.page, head // GROUP
    keys, values = k[0, kv_head, :tokens], v[0, kv_head, :tokens]
    current = (tokens - 1) // page

    def bound(query_head, p):
        block, query = keys[p * page : (p + 1) * page], q[0, query_head]
        return torch.maximum(query * block.amin(0), query * block.amax(0)).sum()

    group = range(kv_head * GROUP, (kv_head + 1) * GROUP)
    by_head = torch.tensor([[bound(g, p) for p in range(current)] for g in group])
    reduce = {"group_max": lambda x: x.amax(0), "group_mean": lambda x: x.mean(0), "group_sum": lambda x: x.sum(0)}
    scores = reduce.get(method.reduce, lambda x: x[head % GROUP])(by_head)
    chosen = set(scores.topk(min(method.budget // page - 1, current)).indices.tolist()) | {current}
    rows = [i for i in range(tokens) if i // page in chosen]
    weights = (keys[rows] @ q[0, head] * 0.3).softmax(-1)
    return weights @ values[rows], len(rows)


@pytest.mark.parametrize("reduce", ["per_q_head", "group_max", "group_mean", "group_sum"])
@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_each_step_attends_to_the_pages_with_the_largest_bounds(page, reduce, engine):
    """By brute force, over enough steps that the current page fills, closes and opens again."""
    method = Quest(budget=32, page=page, reduce=reduce, engine=engine)
    outs, k, v, q = stream(method, steps=37)
    for t, out in enumerate(outs):
        for head in range(HEADS * GROUP):
            right, rows = expected(method, k, v, q[:, :, t], PROMPT + t + 1, head)
            torch.testing.assert_close(out[0, head, 0], right)
            assert rows <= method.budget


def test_single_token_pages_are_exact_top_k_attention():
    method = Quest(budget=20, page=1)
    outs, k, v, q = stream(method, steps=1)
    for head in range(HEADS * GROUP):
        scores = k[0, head // GROUP, :-1] @ q[0, head, 0]
        rows = [*scores.topk(19).indices.tolist(), PROMPT]
        weights = (k[0, head // GROUP, rows] @ q[0, head, 0] * 0.3).softmax(-1)
        torch.testing.assert_close(outs[0][0, head, 0], weights @ v[0, head // GROUP, rows])


def test_the_first_layers_are_dense():
    kv = LayerKV(rand(1, 1, 200, 4), rand(1, 1, 200, 4, seed=1), rand(1, 1, 0, 4), 0.5)
    q, k, v = rand(1, 1, 1, 4, seed=2), rand(1, 1, 1, 4, seed=3), rand(1, 1, 1, 4, seed=4)
    dense = ((torch.cat((kv.k, k), 2) @ q.mT).mT * 0.5).softmax(-1) @ torch.cat((kv.v, v), 2)
    method = Quest(budget=32, dense_layers=2)
    outs = [method.new_layer(layer, kv, rope=None).attend(q, k, v, 0.5) for layer in (0, 1, 2)]
    torch.testing.assert_close(outs[0], dense)
    torch.testing.assert_close(outs[1], dense)
    assert not torch.allclose(outs[2], dense)


def test_offloading_moves_bytes_and_nothing_else():
    k, v, q = rand(1, 2, 64, 8), rand(1, 2, 64, 8, seed=1), rand(1, 4, 5, 8, seed=2)
    kv, turn = LayerKV(k, v, q[:, :, :0], 0.3), (q, k[:, :, :5], v[:, :, :5], 0.3)
    here, there = (Quest(budget=32, offload=offload) for offload in (False, True))
    outs = [method.new_layer(5, kv, rope=None).attend(*turn) for method in (here, there)]
    assert torch.equal(*outs)
    before, after = (method.new_layer(5, kv, rope=None).nbytes() for method in (here, there))
    assert after.host == v.numel() * 4
    assert after.device == before.device - after.host
    dense = there.new_layer(1, kv, rope=None).nbytes()
    assert dense.host == 0


# The fast engine

FAST = [
    Quest(budget=64),
    Quest(budget=48, page=5, dense_layers=0, reduce="group_max"),
    Quest(budget=40, page=8, dense_layers=1, reduce="group_mean"),
    Quest(budget=33, page=1, dense_layers=1, reduce="group_sum"),
    Quest(budget=16, dense_layers=1),  # the newest page alone
    Quest(budget=4096, dense_layers=0),  # all pages
]


def both(engine, prefill, method):
    return [engine.replay(prefill, replace(method, engine=name)) for name in ("reference", "fast")]


def assert_equal_steps(engine, reference, fast, stream):
    for tokens in stream:
        left, right = engine.extend(fast, tokens), engine.extend(reference, tokens)
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_decode_as_with_the_reference(tiny, family):
    engine = Engine(tiny(family), prefill_chunk_tokens=128)
    caches = both(engine, engine.prefill(random_prompt(300)), Quest(budget=64, dense_layers=1))
    assert_equal_steps(engine, *caches, random_prompt(20, seed=5).split(1, dim=1))


@pytest.mark.parametrize("method", FAST, ids=lambda method: method.label)
def test_two_hundred_steps_equal_the_reference(tiny, method):
    """Past the spare room of 128 tokens, and then a turn of many tokens at once."""
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    caches = both(engine, engine.prefill(random_prompt(150, batch=2)), method)
    stream = random_prompt(230, batch=2, seed=5)
    assert_equal_steps(engine, *caches, [*stream[:, :200].split(1, dim=1), stream[:, 200:]])
    layer = caches[1]._shares[0].cache.layers[2]
    assert layer._k.tokens == 150 + 128 + 1 + 128, "it grew once"
    assert layer._low.tokens == -(-layer._k.tokens // method.page)


@pytest.mark.parametrize("method", FAST, ids=lambda method: method.label)
def test_both_engines_choose_the_same_pages(monkeypatch, method):
    """Also among ties, which the lower pages win: every second page is a copy of the one before it."""
    from shadowkv.kernels import slots

    page, pages = method.page, 24
    keys = rand(2, HEADS, pages // 2, page, DIM).repeat_interleave(2, dim=2).flatten(2, 3)
    kv = LayerKV(keys, rand(*keys.shape, seed=1), keys[:, :, :0], 0.3)
    chosen = {"reference": [], "fast": []}
    top, choose = ops.top_indices, slots.choose_chunks
    monkeypatch.setattr(ops, "top_indices", lambda *a: chosen["reference"].append(top(*a)) or top(*a))
    monkeypatch.setattr(slots, "choose_chunks", lambda *a: chosen["fast"].append(choose(*a)) or choose(*a))
    layers = [replace(method, engine=name).new_layer(5, kv, rope=None) for name in ("reference", "fast")]
    q, new = rand(2, HEADS * GROUP, 9, DIM, seed=3), rand(2, HEADS, 9, DIM, seed=4)
    torch.testing.assert_close(*[layer.attend(q, new, new, 0.3) for layer in layers])
    assert len(chosen["fast"]) == 9
    for step, found in enumerate(chosen["fast"]):
        newest = (pages * page + step) // page
        assert (found.amax(dim=-1) == newest).all()
        if chosen["reference"]:  # it does not choose where it reads everything
            older = chosen["reference"][step].flatten(1, 2)
            assert torch.equal(found[..., : older.shape[-1]].long(), older)
        else:
            assert ((found >= 0).sum(dim=-1) == newest + 1).all()


def test_positions_that_were_never_written_do_not_matter(tiny, monkeypatch):
    """Buffers full of NaN to begin with."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(
        "shadowkv.tensors.ragged.empty_beside", lambda shape, like: torch.full(shape, float("nan"), dtype=like.dtype)
    )
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    caches = both(engine, engine.prefill(random_prompt(90)), Quest(budget=48, dense_layers=1))
    assert caches[1]._shares[0].cache.layers[1]._low.data.isnan().any()
    assert_equal_steps(engine, *caches, random_prompt(40, seed=5).split(1, dim=1))


@pytest.mark.parametrize("tokens", [1, 3, 4, 11])
def test_extremes_of_pages(tokens):
    keys = rand(1, 2, tokens, DIM)
    low, high = page_extremes(keys, 4)
    for number, part in enumerate(keys.split(4, dim=2)):
        assert torch.equal(low[:, :, number], part.amin(dim=2))
        assert torch.equal(high[:, :, number], part.amax(dim=2))
    assert low.shape[2] == high.shape[2] == -(-tokens // 4)


def test_offloading_goes_with_the_reference():
    kv = LayerKV(rand(1, 2, 64, 8), rand(1, 2, 64, 8), rand(1, 4, 0, 8), 0.3)
    with pytest.raises(SkvError, match="engine=fast keeps values on the device"):
        Quest(offload=True, engine="fast")
    assert isinstance(Quest(engine="fast").new_layer(2, kv, rope=None), PagedLayer)
    cuda = Dims(4, 4, 2, 8, 4, device="cuda")
    offloaded, reference = Quest(offload=True), Quest(offload=True, engine="reference")
    for asked in ("memory_parts", "read_bytes", "workspace_bytes", "step_flop"):
        assert getattr(offloaded, asked)(cuda, 100) == getattr(reference, asked)(cuda, 100)


def test_the_fast_engine_is_planned_as_it_works():
    """It scores all full pages however few they are, reads lists in place, and holds room for 128 tokens."""
    cuda, method = Dims(4, 6, 2, 64, 2, device="cuda"), Quest(budget=2000, dense_layers=0)
    extremes, lists = 2 * 62 * 128, 2 * 6 * 1000 * 64
    assert method.read_bytes(cuda, 1000) == 4 * (extremes + lists) * 2
    assert method.prompt_bytes(cuda, 1000).device == 4 * (2 * 1128 * 128 + 2 * 71 * 128) * 2
    assert method.workspace_bytes(cuda, 1000) == 6 * 62 * 4
