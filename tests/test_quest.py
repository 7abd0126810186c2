"""What only Quest promises."""

from __future__ import annotations

import pytest
import torch

from shadowkv.method import LayerKV
from shadowkv.methods.quest import Quest

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
def test_each_step_attends_to_the_pages_with_the_largest_bounds(page, reduce):
    """By brute force, over enough steps that the current page fills, closes and opens again."""
    method = Quest(budget=32, page=page, reduce=reduce)
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
