"""What methods that read a chosen part of a full cache promise: the oracle, which bounds them all, and Loki."""

from __future__ import annotations

import pytest
import torch
from tiny_models import geometry_model

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Dims
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import LayerKV
from shadowkv.contract.registry import methods
from shadowkv.methods.oracle import Oracle
from shadowkv.methods.retrieval.loki import Loki

HEADS, DIM, SCALING, PROMPT = 2, 256, 0.1, 200


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Spelled:
    """One layer whose values spell their positions, so that an output is the attention weights behind it."""

    def __init__(self, group, steps, seed=0):
        total = PROMPT + steps
        assert total <= DIM
        self.group, self.steps = group, steps
        self.k = rand(1, HEADS, total, DIM, seed=seed + 1)
        self.q = rand(1, HEADS * group, total, DIM, seed=seed + 2)
        self.v = torch.eye(DIM)[:total].expand(1, HEADS, -1, -1)

    def weights(self, method, rope=None):
        """What `method` attends to at each step: [steps,Hq,positions]."""
        k, v, q = (x[:, :, :PROMPT] for x in (self.k, self.v, self.q))
        state = method.new_layer(2, LayerKV(k, v, q[:, :, -64:], SCALING, q), rope)
        new = range(PROMPT, PROMPT + self.steps)
        return torch.cat([state.attend(*(x[:, :, t : t + 1] for x in (self.q, self.k, self.v)), SCALING) for t in new])[
            :, :, 0
        ]

    def true_weights(self):
        """Full attention at each step: [steps,Hq,positions]."""
        k = self.k.repeat_interleave(self.group, dim=1)[0]
        scores = self.q[0, :, PROMPT:] @ k.mT * SCALING
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(PROMPT + 1), float("-inf"))
        return torch.nn.functional.pad(scores.softmax(-1).transpose(0, 1), (0, DIM - k.shape[1]))


# Oracle


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("reduce", ["per_q_head", "group_max", "group_mean", "group_sum"])
@pytest.mark.parametrize("choice", [{"budget": 20}, {"top_p": 0.6}], ids=str)
def test_oracle_attends_to_the_largest_weights(group, reduce, choice):
    stream, method = Spelled(group, steps=6), Oracle(reduce=reduce, **choice)
    true, got = stream.true_weights(), stream.weights(method)
    for t in range(6):
        for head in range(HEADS * group):
            mates = true[t, head // group * group :][:group]
            score = {"per_q_head": true[t, head], "group_max": mates.amax(0)}.get(reduce, mates.mean(0))
            order = score.argsort(descending=True).tolist()
            kept = order[:20]
            if method.top_p:
                kept = []
                while score[kept].sum() < 0.6 * score.sum():
                    kept.append(order[len(kept)])
            expected = torch.zeros(DIM)
            expected[kept] = true[t, head, kept] / true[t, head, kept].sum()
            torch.testing.assert_close(got[t, head], expected, rtol=1e-4, atol=1e-6)


# Settings that leave things out at 200 tokens, for the methods whose defaults do not.
_SMALL = {
    "shadowkv": {"rank": 200, "budget": 32, "outliers": 2},
    "quest": {"budget": 48},
    "snapkv": {"budget": 48},
    "streaming": {"budget": 40},
    "tova": {"budget": 40},
    "h2o": {"budget": 40},
    "pyramidkv": {"budget": 40},
    "loki": {"budget": 40, "basis": "prompt"},
}


# Those whose layers choose tokens by themselves; kivi and xkv leave none out, duo and infinigen need all layers.
@pytest.mark.parametrize("name", _SMALL)
def test_no_method_holds_more_of_the_attention_than_the_oracle(name):
    stream = Spelled(group=3, steps=8)
    model = geometry_model(3, DIM)
    true = stream.true_weights()
    chosen = stream.weights(methods()[name](**_SMALL[name]), Rope(model)) > 0
    counts = chosen.sum(-1)
    assert counts.max() < PROMPT / 2, "a method that leaves nothing out proves nothing"
    for t, head in [(0, 0), (3, 4), (7, 5)]:
        best = stream.weights(Oracle(budget=int(counts[t, head])))[t, head] > 0
        assert best.sum() == counts[t, head]
        held, bound = (true[t, head, kept].sum() for kept in (chosen[t, head], best))
        assert held <= bound + 1e-6


def test_a_larger_budget_only_adds_to_the_oracles_tokens():
    stream = Spelled(group=3, steps=4)
    few, more = (stream.weights(Oracle(budget=budget)) > 0 for budget in (10, 30))
    assert (few <= more).all()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"top_p": 1.5}, "top_p=1.5 is not in"),
        ({"top_p": 0.5, "budget": 10}, "not both"),
        ({"budget": 0}, "at least 1"),
        ({"reduce": "best"}, "one of per_q_head"),
    ],
)
def test_the_oracle_refuses_what_means_nothing(parameters, said):
    with pytest.raises(SkvError, match=said):
        Oracle(**parameters)


# Loki


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("reduce", ["per_q_head", "group_max", "group_mean", "group_sum"])
@pytest.mark.parametrize("rank", [None, 5])
def test_loki_ranks_by_the_first_principal_components(group, reduce, rank):
    """Components by a full SVD of the prompt's centred keys; scores of the keys as they are."""
    stream, method = Spelled(group, steps=6), Loki(basis="prompt", budget=20, rank=rank, reduce=reduce)
    true, got = stream.true_weights(), stream.weights(method)
    for kv_head in range(HEADS):
        keys = stream.k[0, kv_head].double()
        prompt = keys[:PROMPT]
        components = torch.linalg.svd(prompt - prompt.mean(0))[2][: rank or DIM // 4]
        heads = range(kv_head * group, (kv_head + 1) * group)
        for t in range(6):
            seen = PROMPT + t + 1
            queries = stream.q[0, heads, PROMPT + t].double()
            weights = (((queries @ components.mT) @ (keys[:seen] @ components.mT).mT) * SCALING).softmax(-1)
            for head, own in zip(heads, weights, strict=True):
                score = {"group_max": weights.amax(0), "per_q_head": own}.get(reduce, weights.mean(0))
                kept = score.topk(20).indices
                expected = torch.zeros(DIM)
                expected[kept] = true[t, head, kept] / true[t, head, kept].sum()
                torch.testing.assert_close(got[t, head], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_loki_with_all_components_is_the_oracle(head_dim):
    k, v, q = rand(1, 2, 81, head_dim, seed=1), rand(1, 2, 81, head_dim, seed=2), rand(1, 6, 81, head_dim, seed=3)
    kv = LayerKV(k[:, :, :80], v[:, :, :80], q[:, :, 16:80], SCALING)
    new = q[:, :, 80:], k[:, :, 80:], v[:, :, 80:]
    loki, oracle = (
        m.new_layer(0, kv, None) for m in (Loki(basis="prompt", budget=20, rank=head_dim), Oracle(budget=20))
    )
    torch.testing.assert_close(loki.attend(*new, SCALING), oracle.attend(*new, SCALING))


def test_loki_ranks_alike_if_all_keys_move():
    """A bias on the keys, as Qwen2 has, moves all scores of a query by the same amount."""
    stream, method = Spelled(3, steps=3), Loki(basis="prompt", budget=20, rank=16)
    before = stream.weights(method)
    stream.k = stream.k + 3 * rand(1, HEADS, 1, DIM, seed=9)
    torch.testing.assert_close(stream.weights(method), before, rtol=1e-3, atol=1e-5)


def test_loki_refuses_more_components_than_there_are():
    with pytest.raises(SkvError, match="exceeds the head size of this model, 64"):
        Loki(rank=65).check(Dims(layers=2, q_heads=4, kv_heads=2, head_dim=64, element_bytes=2))
