"""What only InfiniGen promises, and the guesses that it rests on."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

import pytest
import torch
from tiny_models import FAMILIES, random_prompt, through, tiny_model

from shadowkv.common.dims import Dims
from shadowkv.common.errors import SkvError
from shadowkv.contract.layerwise import LayerwiseCache
from shadowkv.contract.method import DecodeCache, LayerKV
from shadowkv.engine.drop_in import new_cache
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full
from shadowkv.methods.retrieval.infinigen import InfiniGen, rotation

PROMPT = 80


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream(method, groups, dim, steps, batch=1):
    """Outputs of `steps` single-token calls on layer 5, all that went in, and the states."""
    k, v = rand(batch, 2, PROMPT + steps, dim, seed=1), rand(batch, 2, PROMPT + steps, dim, seed=2)
    q, guess = (rand(batch, 2 * groups, steps, dim, seed=seed) for seed in (3, 4))
    q_tail = rand(batch, 2 * groups, 270, dim, seed=5)  # more rows than channels: all directions are theirs
    cache = method.new_state(rope=None)
    cache.ingest(5, LayerKV(k[:, :, :PROMPT], v[:, :, :PROMPT], q_tail, 0.3))
    outs = []
    for t in range(steps):
        cache.foresee(lambda layer, t=t: guess[:, :, t : t + 1])
        new = slice(PROMPT + t, PROMPT + t + 1)
        outs.append(cache.attend(5, q[:, :, t : t + 1], k[:, :, new], v[:, :, new], 0.3))
    return outs, k, v, q, guess, q_tail, cache


def expected_rows(method, k, guess, q_tail, row, tokens, groups):
    """The tokens that each query head reads, by the definition; k holds what came before the newest token."""
    scores = []
    for head in range(2 * groups):
        kv_head = head // groups
        stacked = torch.cat([q_tail[row, kv_head * groups + g] for g in range(groups)]).double()
        _, _, vectors = torch.linalg.svd(stacked)
        both = (stacked, k[row, kv_head, :PROMPT].double())
        lists = [(x @ vectors.T).abs().sum(0).topk(method.columns(k.shape[-1])).indices.tolist() for x in both]
        partial = vectors[sorted({*lists[0], *lists[1]})].float()
        scores.append((k[row, kv_head, :tokens] @ partial.T) @ (partial @ guess[row, head]) * 0.3)
    counts = [(s.exp() > math.exp(-method.alpha) * s.max().exp()).sum().item() for s in scores]
    count = min(max(sum(counts) // len(counts), 1), method.budget - 1)
    chosen = []
    for head in range(2 * groups):
        group = torch.stack([scores[head // groups * groups + g] for g in range(groups)])
        reduce = {"group_max": lambda x: x.amax(0), "group_mean": lambda x: x.mean(0), "group_sum": lambda x: x.sum(0)}
        chosen.append(reduce.get(method.reduce, lambda x, g=head % groups: x[g])(group).topk(count).indices.tolist())
    return chosen


@pytest.mark.parametrize("reduce", ["per_q_head", "group_max", "group_mean", "group_sum"])
@pytest.mark.parametrize(("groups", "dim"), [(1, 64), (3, 96), (4, 128), (1, 256)])
def test_each_step_reads_the_tokens_within_alpha_of_the_best_guess(groups, dim, reduce):
    method = InfiniGen(budget=30, alpha=1.5, ratio=0.2, reduce=reduce)
    outs, k, v, q, guess, q_tail, _ = stream(method, groups, dim, steps=12, batch=2)
    counts = set()
    for t, out in enumerate(outs):
        for row in range(2):
            chosen = expected_rows(method, k, guess[:, :, t], q_tail, row, PROMPT + t, groups)
            counts.add(len(chosen[0]))
            for head in range(2 * groups):
                rows = [*chosen[head], PROMPT + t]
                weights = (k[row, head // groups, rows] @ q[row, head, t] * 0.3).softmax(-1)
                torch.testing.assert_close(out[row, head, 0], weights @ v[row, head // groups, rows])
    assert len(counts) > 1, "rows and steps that all read the same number would prove little"


def test_the_skew_is_a_rotation_and_changes_no_score():
    q, k = rand(2, 6, 40, 16), rand(2, 2, 50, 16, seed=1)
    turned = rotation(q, k)
    torch.testing.assert_close(turned.mT @ turned, torch.eye(16).expand(2, 2, 16, 16), rtol=0, atol=1e-5)
    grouped = q.view(2, 2, -1, 16)
    torch.testing.assert_close((grouped @ turned) @ (k @ turned).mT, grouped @ k.mT, rtol=1e-4, atol=1e-4)


def test_directions_that_no_query_has_are_those_of_the_keys():
    """Fewer queries than channels, as of a model without groups: what is left over is no arbitrary basis."""
    q, k = rand(1, 1, 3, 16), rand(1, 1, 50, 16, seed=1)
    turned = rotation(q, k)[0, 0]
    spanned = torch.linalg.svd(q[0, 0]).Vh[:3]
    torch.testing.assert_close((turned[:, -3:].mT @ spanned.mT).square().sum(), torch.tensor(3.0))
    rest = turned[:, :-3].double()
    gram = rest.mT @ (k[0, 0].double().mT @ k[0, 0].double()) @ rest
    torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=0.05)
    assert gram.diag().tolist() == sorted(gram.diag().tolist())


def test_a_larger_alpha_reads_more_up_to_the_budget():
    read = []
    for alpha in (0.0, 1.0, 2.0, 4.0, math.inf):
        *_, guess, _, cache = stream(InfiniGen(budget=64, alpha=alpha), groups=2, dim=64, steps=1)
        read.append(cache._guessed[5][0]._choose(guess[:, :, :1], 0.3).shape[-1])
    assert read[0] == 1
    assert read == sorted(read)
    assert len(set(read)) >= 4
    assert read[-1] == 63


def test_true_queries_and_all_channels_read_the_top_tokens():
    """ratio=1 and a perfect guess: exact top-k attention."""
    k, v, q = rand(1, 2, PROMPT + 1, 16, seed=1), rand(1, 2, PROMPT + 1, 16, seed=2), 2 * rand(1, 4, 1, 16, seed=3)
    cache = InfiniGen(budget=21, alpha=math.inf, ratio=1.0).new_state(rope=None)
    cache.ingest(5, LayerKV(k[:, :, :PROMPT], v[:, :, :PROMPT], rand(1, 4, 9, 16), 0.3))
    cache.foresee(lambda layer: q)
    out = cache.attend(5, q, k[:, :, PROMPT:], v[:, :, PROMPT:], 0.3)
    for head in range(4):
        rows = [*(k[0, head // 2, :PROMPT] @ q[0, head, 0]).topk(20).indices.tolist(), PROMPT]
        weights = (k[0, head // 2, rows] @ q[0, head, 0] * 0.3).softmax(-1)
        torch.testing.assert_close(out[0, head, 0], weights @ v[0, head // 2, rows])


def test_partial_keys_are_on_the_device_and_whole_ones_on_the_host():
    dims = Dims(layers=4, q_heads=4, kv_heads=2, head_dim=16, element_bytes=4)
    *_, cache = stream(InfiniGen(ratio=0.2), groups=2, dim=16, steps=0)
    assert cache.nbytes().host == 2 * PROMPT * 32 * 4
    kept = [skew.shape[1] for skew in cache._guessed[5][0]._skews]
    assert all(3 <= count <= 6 for count in kept), "the union of two lists of three"
    assert len({*kept, 3, 6}) > 2, "lists that are equal, or share nothing, would prove little"
    assert cache.nbytes().device == sum(kept) * (PROMPT + 16) * 4
    assert InfiniGen(ratio=0.2).bytes_per_token(dims) == (2 * 256 + 2 * 2 * 6 * 4, 2 * 256)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"budget": 1}, "at least 2"),
        ({"alpha": -1.0}, "negative"),
        ({"ratio": 0.0}, "not in"),
        ({"dense_layers": 0}, "1"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, says):
    with pytest.raises(SkvError, match=says):
        InfiniGen(**change)


@dataclass(frozen=True)
class _Spy(Full):
    """Full attention that compares what it is told with what it sees."""

    name = "spy"

    @property
    def speculates(self):
        return True

    def new_state(self, rope):
        return _SpyCache(LayerwiseCache(Full(), rope))


class _SpyCache(DecodeCache):
    def __init__(self, full):
        self.full, self.seen, self.guessed, self.foresight = full, {}, {}, None

    def ingest(self, layer, kv):
        self.full.ingest(layer, kv)

    def foresee(self, guess):
        self.guess = guess

    def attend(self, layer, q, k, v, scaling):
        if layer:
            self.guessed[layer] = self.guess(layer)
            self.foresight._guesses.clear()
            self.seen[layer] = (q, self.foresight.query(layer, seen_by=layer))
            self.foresight._guesses.clear()
        return self.full.attend(layer, q, k, v, scaling)

    def nbytes(self):
        return self.full.nbytes()


def spied(model, tokens=3):
    engine = Engine(model, prefill_chunk_tokens=128)
    cache = engine.replay(engine.prefill(random_prompt(300)), _Spy())
    spy = cache._shares[0].cache
    spy.foresight = cache._foresight
    with torch.no_grad():
        model(random_prompt(tokens, seed=5), **through(model, cache), use_cache=True)
    return spy, cache


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_told_its_own_input_gives_its_own_query(tiny, family):
    """The probe runs the layer's own code, whatever the family; nothing of the pass itself changes."""
    spy, _ = spied(tiny(family))
    assert spy.seen or family == "mistral-sliding", "only a model without layers to serve is told nothing"
    for layer, (q, told) in spy.seen.items():
        assert torch.equal(q, told)
        assert not torch.allclose(q, spy.guessed[layer])


def test_a_guess_is_the_next_layers_query_of_the_previous_layers_input():
    model = tiny_model("llama")
    spy, _ = spied(model)
    seen = {}
    hook = model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    ids = torch.cat((random_prompt(300), random_prompt(3, seed=5)), dim=1)
    with torch.no_grad():
        model(ids)
        hook.remove()
        layer = model.model.layers[2]
        x = layer.input_layernorm(seen["x"])
        q = layer.self_attn.q_proj(x).view(1, 303, 4, 16).transpose(1, 2)
        cos, sin = model.model.rotary_emb(x, torch.arange(303)[None])
        half = torch.cat((-q[..., 8:], q[..., :8]), dim=-1)
        expected = (q * cos[:, None] + half * sin[:, None])[:, :, 300:]
    torch.testing.assert_close(spy.guessed[2], expected, rtol=1e-4, atol=1e-4)


def hooks_on(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_hooks_go_with_the_cache_and_nothing_is_remembered_between_passes():
    model = tiny_model("llama")
    before = hooks_on(model)
    _, cache = spied(model)
    assert hooks_on(model) > before
    assert not cache._foresight._inputs
    cache.close()
    assert hooks_on(model) == before
    cache = new_cache(InfiniGen(), model)
    assert hooks_on(model) > before
    del cache
    gc.collect()
    assert hooks_on(model) == before


def test_only_the_passes_of_its_own_cache_are_watched():
    model = tiny_model("llama")
    _, cache = spied(model)
    seen = []
    cache._foresight._leave = lambda *_: seen.append(dict(cache._foresight._inputs))
    cache._foresight._hooks[-1].remove()
    model.model.layers[-1].register_forward_hook(cache._foresight._leave)
    with torch.no_grad():
        model(random_prompt(5))
    assert seen == [{}]


@pytest.mark.parametrize("family", ["llama", "qwen3", "glm", "gemma3"])
def test_generate_with_padded_rows_gives_the_tokens_of_the_engine(tiny, family):
    model, method = tiny(family), InfiniGen(budget=40, alpha=3.0, dense_layers=1)
    engine = Engine(model, prefill_chunk_tokens=512)
    prompts = [random_prompt(n, seed=n) for n in (120, 300)]
    mine = [engine.generate(prompt, method, 12)[0] for prompt in prompts]
    ids = torch.zeros(2, 300, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, 300 - prompt.shape[1] :], mask[row, 300 - prompt.shape[1] :] = prompt[0], 1
    theirs = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        **through(model, new_cache(method, model)),
    )
    assert theirs[:, 300:].tolist() == mine
