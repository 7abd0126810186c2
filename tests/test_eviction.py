"""What methods that forget tokens promise, each against its definition by brute force."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_models import FAMILIES, random_prompt, through
from torch.nn import functional as F

from shadowkv.anatomy.rope import Rope
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import LayerKV, depth_of
from shadowkv.engine.drop_in import new_cache
from shadowkv.engine.engine import Engine
from shadowkv.methods.eviction.h2o import H2O
from shadowkv.methods.eviction.pyramidkv import PyramidKV
from shadowkv.methods.eviction.snapkv import SnapKV
from shadowkv.methods.eviction.streaming import StreamingLLM
from shadowkv.methods.eviction.tova import TOVA

HEADS, SCALING = 2, 0.3
GEOMETRIES = [(1, 64), (3, 96), (4, 128), (3, 256)]  # query heads per KV head, head size


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Stream:
    """Random keys, values and queries of `tokens` prompt tokens and `steps` new ones, for one layer."""

    def __init__(self, tokens, steps=0, group=3, head_dim=64, batch=1, seed=0):
        self.tokens, self.steps, self.group = tokens, steps, group
        total = tokens + steps
        self.k = rand(batch, HEADS, total, head_dim, seed=seed + 1)
        self.v = rand(batch, HEADS, total, head_dim, seed=seed + 2)
        self.q = rand(batch, HEADS * group, total, head_dim, seed=seed + 3)
        self.q *= 8 / head_dim**0.5  # attention as peaked for every head size

    @property
    def prompt(self):
        k, v, q = (x[:, :, : self.tokens] for x in (self.k, self.v, self.q))
        return LayerKV(k, v, q[:, :, -64:], SCALING, q)

    def run(self, method, layer=1, rope=None, depth=0.5):
        """Outputs of one call per new token: a list of [B,Hq,1,D]."""
        state = method.new_layer(layer, self.prompt._replace(depth=depth), rope)
        new = range(self.tokens, self.tokens + self.steps)
        return [state.attend(*(x[:, :, t : t + 1] for x in (self.q, self.k, self.v)), SCALING) for t in new]

    def weights(self, head, t, kept):
        """Attention of query head `head` at position t over the positions `kept`, of the first row."""
        return (self.k[0, head // self.group, kept] @ self.q[0, head, t] * SCALING).softmax(-1)

    def output(self, head, t, kept):
        return self.weights(head, t, kept) @ self.v[0, head // self.group, kept]

    def group_of(self, kv_head):
        return range(kv_head * self.group, (kv_head + 1) * self.group)


# SnapKV


def snap_kept(stream, method, kv_head):
    """The prompt tokens that SnapKV keeps, by the paper's listing, a query and a token at a time."""
    older = stream.tokens - method.window
    by_head = []
    for head in stream.group_of(kv_head):
        received = torch.zeros(older)
        for t in range(older, stream.tokens):
            received += stream.weights(head, t, list(range(t + 1)))[:older]
        padded = F.pad(received, (method.kernel // 2,) * 2).unfold(0, method.kernel, 1)
        by_head.append(padded.mean(-1) if method.pooling == "avg" else padded.amax(-1))
    scores = torch.stack(by_head)
    scores = scores.amax(0) if method.reduce == "group_max" else scores.mean(0)
    # Neighbours of a maximum share it, and the lower ones of them stay.
    chosen = scores.sort(descending=True, stable=True).indices[: method.budget - method.window].tolist()
    return sorted(chosen) + list(range(older, stream.tokens))


@pytest.mark.parametrize(("group", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize(
    "method",
    [
        SnapKV(budget=40, window=16),
        SnapKV(budget=40, window=8, kernel=7, pooling="max", reduce="group_max"),
        SnapKV(budget=33, window=32, kernel=1, reduce="group_sum"),
    ],
    ids=lambda method: method.label,
)
def test_snapkv_keeps_what_its_window_attends_to_and_all_that_follows(method, group, head_dim):
    stream = Stream(120, steps=5, group=group, head_dim=head_dim)
    outs = stream.run(method)
    for kv_head in range(HEADS):
        prompt = snap_kept(stream, method, kv_head)
        assert len(prompt) == method.budget
        for t, out in enumerate(outs, start=120):
            kept = prompt + list(range(120, t + 1))
            for head in stream.group_of(kv_head):
                torch.testing.assert_close(out[0, head, 0], stream.output(head, t, kept), rtol=1e-4, atol=1e-5)


def test_snapkv_holds_its_budget_and_not_the_prefill():
    stream = Stream(300)
    state = SnapKV(budget=64, window=16).new_layer(0, stream.prompt, None)
    assert state.nbytes().device == 2 * HEADS * 64 * 64 * 4
    whole = SnapKV(budget=300).new_layer(0, stream.prompt, None)
    assert whole.nbytes().device == 2 * HEADS * 300 * 64 * 4


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"window": 65}, "window must be 1 to 64"),
        ({"budget": 32}, "budget=32 must be larger than window=32"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"pooling": "sum"}, "one of avg, max"),
        ({"reduce": "per_q_head"}, "one of group_max, group_mean, group_sum"),
    ],
)
def test_snapkv_refuses_what_it_cannot_do(parameters, said):
    with pytest.raises(SkvError, match=said):
        SnapKV(**parameters)


# PyramidKV


@pytest.mark.parametrize("tokens", [40, 101, 150, 170, 4096])
@pytest.mark.parametrize("layers", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("beta", [1, 2, 20])
def test_pyramidkv_gives_every_layer_its_share_of_the_same_total(tokens, layers, beta):
    method = PyramidKV(budget=100, window=16, beta=beta)
    budgets = [method.layer_budget(depth_of(place, layers), tokens) for place in range(layers)]
    assert budgets == sorted(budgets, reverse=True)
    assert abs(sum(budgets) - layers * 100) <= 1
    assert max(budgets) <= max(tokens, 100)
    if tokens == 4096 and layers > 1:
        assert budgets[-1] == 16 + 84 // beta
    steps = [high - low for high, low in pairwise(budgets)]
    assert not steps or max(steps) - min(steps) <= 1, "linear but for rounding"


@pytest.mark.parametrize(("tokens", "first"), [(100, 100), (167, 100), (168, 168), (175, 175), (181, 180), (4096, 180)])
def test_pyramidkv_is_flat_where_its_authors_code_is(tokens, first):
    """Up to twice what is chosen of a prompt, every layer keeps the same; the first layer never more than there is."""
    method = PyramidKV(budget=100, window=16)
    assert [method.layer_budget(depth, tokens) for depth in (0.0, 0.5, 1.0)] == [first, 100, 200 - first]


def test_pyramidkv_is_snapkv_with_the_budget_of_its_depth(tiny):
    stream, method = Stream(300, steps=4), PyramidKV(budget=60, window=8, kernel=3)
    for depth in (0.0, 0.25, 1.0):
        budget = method.layer_budget(depth, 300)
        snap = stream.run(SnapKV(budget=budget, window=8, kernel=3))
        pyramid = stream.run(method, depth=depth)
        assert all(torch.equal(a, b) for a, b in zip(snap, pyramid, strict=True))
    engine = Engine(tiny("llama"))
    prefill = engine.prefill(random_prompt(300))
    held = engine.replay(prefill, method).nbytes()
    assert held == method.prompt_bytes(engine.dims, 300)
    layers = engine.replay(prefill, method)._shares[0].cache.layers
    token_bytes = engine.dims.full_bytes_per_token // engine.dims.layers
    kept = [layers[i].nbytes().device // token_bytes for i in range(3)]
    assert kept == [method.layer_budget(depth, 300) for depth in (0.0, 0.5, 1.0)]
    snap, flat = (engine.generate(random_prompt(300), m(budget=60), 16) for m in (SnapKV, _flat_pyramid))
    assert snap == flat


def _flat_pyramid(budget):
    return PyramidKV(budget=budget, beta=1)


# StreamingLLM


def streaming_kept(method, t):
    """Positions attended to by the token at position t."""
    tokens = list(range(t + 1))
    return tokens if t < method.budget else tokens[: method.sinks] + tokens[method.sinks - method.budget :]


@pytest.mark.parametrize(("group", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("prompt_tokens", [1, 3, 20, 40, 60])
@pytest.mark.parametrize("sinks", [0, 4])
def test_streaming_attends_to_sinks_and_window(group, head_dim, prompt_tokens, sinks):
    """Filling up, rolling, and rolling over the end of its ring more than once."""
    stream = Stream(prompt_tokens, steps=70, group=group, head_dim=head_dim)
    method = StreamingLLM(budget=30, sinks=sinks, rerotate=False)
    for t, out in enumerate(stream.run(method), start=prompt_tokens):
        kept = streaming_kept(method, t)
        assert len(kept) == min(t + 1, 30)
        for head in range(HEADS * group):
            torch.testing.assert_close(out[0, head, 0], stream.output(head, t, kept), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rerotation_gives_positions_inside_the_cache(tiny, family):
    """Against the authors' way: every key before RoPE, rotated at its place in the cache, as is the query."""
    model = tiny(family)
    rope, head_dim = Rope(model), getattr(model.config, "head_dim", None) or 16
    layer, method, prompt = 1, StreamingLLM(budget=24, sinks=4), 50
    stream = Stream(prompt, steps=40, head_dim=head_dim)
    length = prompt + 40
    pre_k, pre_q = stream.k, stream.q
    stream.k, stream.q = (rope.rotate(layer, x, torch.arange(length), length) for x in (pre_k, pre_q))
    for t, out in enumerate(stream.run(method, layer, rope), start=prompt):
        kept = streaming_kept(method, t)
        k = rope.rotate(layer, pre_k[:, :, kept], torch.arange(24), length)
        q = rope.rotate(layer, pre_q[:, :, t : t + 1], torch.tensor([23]), length)
        k, v = (x.repeat_interleave(stream.group, dim=1) for x in (k, stream.v[:, :, kept]))
        expected = F.scaled_dot_product_attention(q, k, v, scale=SCALING)
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_streaming_forgets_the_middle_for_good():
    stream, method = Stream(100, steps=20), StreamingLLM(budget=30, rerotate=False)
    before = stream.run(method)
    stream.k[:, :, 4:70], stream.v[:, :, 4:70] = 100.0, 100.0
    assert all(torch.equal(a, b) for a, b in zip(before, stream.run(method), strict=True))
    assert method.new_layer(0, stream.prompt, None).nbytes().device == 2 * HEADS * 30 * 64 * 4


# TOVA


@pytest.mark.parametrize(("group", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("prompt_tokens", [1, 60])
def test_tova_drops_what_the_newest_query_attends_to_least(group, head_dim, prompt_tokens):
    stream = Stream(prompt_tokens, steps=40, group=group, head_dim=head_dim)
    method = TOVA(budget=20)

    def attended(t, kept):
        """Mean attention of position t over all heads to each of `kept`, itself out of competition."""
        mean = torch.stack([stream.weights(head, t, kept) for head in range(HEADS * group)]).mean(0)
        return dict(zip(kept, mean.tolist(), strict=True)) | {t: float("inf")}

    latest = attended(prompt_tokens - 1, list(range(prompt_tokens)))
    latest = {token: latest[token] for token in sorted(latest, key=latest.get)[-20:]}
    for t, out in enumerate(stream.run(method), start=prompt_tokens):
        if len(latest) == 20:
            del latest[min(latest, key=latest.get)]
        kept = [*latest, t]
        assert t - 1 in kept
        for head in range(HEADS * group):
            torch.testing.assert_close(out[0, head, 0], stream.output(head, t, kept), rtol=1e-4, atol=1e-5)
        latest = attended(t, kept)


# H2O


class H2OByHand:
    """The tokens one KV head keeps and their scores, in a dictionary."""

    def __init__(self, stream, method, kv_head):
        self.stream, self.method, self.heads = stream, method, stream.group_of(kv_head)
        self.score = {}
        for t in range(stream.tokens):
            if method.evict == "greedy":
                self.make_room(t)
            self.see(t)
        if len(self.score) > method.budget:
            window = range(stream.tokens - method.recent_tokens, stream.tokens)
            heavy = sorted(set(self.score) - set(window), key=self.score.get, reverse=True)
            kept = [*heavy[: method.budget - len(window)], *window]
            self.score = {token: self.score[token] for token in kept}

    def make_room(self, t):
        if len(self.score) == self.method.budget:
            old = [token for token in self.score if token <= t - self.method.recent_tokens]
            del self.score[min(old, key=self.score.get)]

    def see(self, t):
        kept = [*self.score, t]
        weights = torch.stack([self.stream.weights(head, t, kept) for head in self.heads]).mean(0)
        for token, weight in zip(kept, weights.tolist(), strict=True):
            self.score[token] = self.score.get(token, 0.0) + weight


@pytest.mark.parametrize(("group", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("prompt_tokens", [1, 60])
@pytest.mark.parametrize(
    "method",
    [
        H2O(budget=20),
        H2O(budget=20, evict="greedy"),
        H2O(budget=20, recent=1, evict="greedy"),
        H2O(budget=21, recent=5),
    ],
    ids=lambda method: method.label,
)
def test_h2o_keeps_heavy_hitters_and_the_newest(method, group, head_dim, prompt_tokens):
    stream = Stream(prompt_tokens, steps=40, group=group, head_dim=head_dim)
    outs = stream.run(method)
    for kv_head in range(HEADS):
        by_hand = H2OByHand(stream, method, kv_head)
        for t, out in enumerate(outs, start=prompt_tokens):
            by_hand.make_room(t)
            by_hand.see(t)
            assert len(by_hand.score) <= method.budget
            for head in stream.group_of(kv_head):
                expected = stream.output(head, t, list(by_hand.score))
                torch.testing.assert_close(out[0, head, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("evict", ["post_prefill", "greedy"])
def test_h2o_scores_grow_by_the_attention_of_each_query(evict):
    """A query gives 1 in total; what tokens gave away with them when they were dropped is gone."""
    stream = Stream(60, steps=1)
    state = H2O(budget=100, evict=evict).new_layer(0, stream.prompt, None)
    torch.testing.assert_close(state._score.sum(-1), torch.full((1, HEADS), 60.0))
    state.attend(*(x[:, :, 60:] for x in (stream.q, stream.k, stream.v)), SCALING)
    torch.testing.assert_close(state._score.sum(-1), torch.full((1, HEADS), 61.0))


def test_h2o_of_recent_tokens_only_is_a_sliding_window():
    stream = Stream(60, steps=30)
    window = stream.run(StreamingLLM(budget=20, sinks=0))
    for evict in ("post_prefill", "greedy"):
        for mine, theirs in zip(stream.run(H2O(budget=20, recent=20, evict=evict)), window, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_h2o_needs_an_engine_that_records_queries(tiny):
    engine, ids = Engine(tiny("llama")), random_prompt(100)
    with pytest.raises(SkvError, match="record_queries=True"):
        engine.generate(ids, H2O(budget=20), 4)
    recording = Engine(tiny("llama"), prefill_chunk_tokens=100, record_queries=True)
    mine = recording.generate(ids, H2O(budget=20), 12)[0]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cache = new_cache(H2O(budget=20), tiny("llama"))
    assert tiny("llama").generate(ids, **through(tiny("llama"), cache), **options)[0, 100:].tolist() == mine


@pytest.mark.parametrize("tokens", [30, 100, 400])
@pytest.mark.parametrize(
    "method", [H2O(budget=90), SnapKV(budget=90), PyramidKV(budget=90), TOVA(budget=90), StreamingLLM(budget=90)]
)
def test_planned_bytes_know_the_budget(tiny, method, tokens):
    """A cost per prompt token, which is 0 for these methods, would plan for nothing."""
    engine = Engine(tiny("llama"), record_queries=True)
    held = engine.replay(engine.prefill(random_prompt(tokens)), method).nbytes()
    planned = method.prompt_bytes(engine.dims, tokens)
    assert held.device == pytest.approx(planned.device, rel=0.02)
    assert planned.device <= (90 * 1.1) * engine.dims.full_bytes_per_token


@pytest.mark.parametrize("method", [H2O(budget=40), SnapKV(budget=40), TOVA(budget=40), StreamingLLM(budget=40)])
def test_left_padded_rows_are_chosen_from_as_they_are_alone(tiny, method):
    model, prompts = tiny("llama"), [random_prompt(n, seed=n) for n in (90, 150)]
    ids, mask = torch.zeros(2, 150, dtype=torch.long), torch.zeros(2, 150, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 150 - prompt.shape[1] :], mask[row, 150 - prompt.shape[1] :] = prompt, 1
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **through(model, new_cache(method, model)), **options)
    for row, prompt in enumerate(prompts):
        alone = Engine(model, prefill_chunk_tokens=512, record_queries=True).generate(prompt, method, 12)[0]
        assert together[row, 150:].tolist() == alone
