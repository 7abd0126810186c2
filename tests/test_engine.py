"""The engine against stock transformers: same tokens, same numbers however the prompt is computed."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, random_prompt, through
from transformers.cache_utils import DynamicCache, StaticCache

from shadowkv.anatomy.attention import attach, dense_attention
from shadowkv.anatomy.geometry import sliding_windows
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import methods
from shadowkv.engine.drop_in import new_cache
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full
from shadowkv.methods.shadowkv.method import ShadowKV

PROMPT_TOKENS = 300
NEW_TOKENS = 64


def stock_logits(model, ids, new_tokens):
    """Greedy tokens and the logits before each of them, by plain `generate` with its own cache."""
    model.set_attn_implementation("sdpa")
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.stack(out.logits, dim=1)[0].float()


def forced_logits(engine, prefill, method, tokens):
    """Logits before each of `tokens` when the method is fed exactly those, so that errors cannot hide or add up."""
    cache = engine.replay(prefill, method)
    rows = [prefill.logits]
    for token in tokens[:-1]:
        rows.append(engine.extend(cache, torch.tensor([[token]])))
    return torch.cat(rows)


def relative_error(got, expected):
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_gives_the_tokens_of_generate(tiny, family):
    model, ids = tiny(family), random_prompt(PROMPT_TOKENS)
    expected, _ = stock_logits(model, ids, NEW_TOKENS)
    engine = Engine(model, prefill_chunk_tokens=128)
    assert engine.generate(ids, Full(), NEW_TOKENS)[0] == expected
    assert len(set(expected)) > 3, "a model that repeats itself would prove nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", methods())
def test_lossless_setting_equals_full_attention(tiny, family, name):
    model, ids = tiny(family), random_prompt(PROMPT_TOKENS)
    tokens, expected = stock_logits(model, ids, NEW_TOKENS)
    engine = Engine(model, prefill_chunk_tokens=128, record_queries=True)
    method = methods()[name]().lossless(engine.dims, PROMPT_TOKENS + NEW_TOKENS)
    if method is None:
        pytest.skip(f"{name} declares no lossless setting")
    got = forced_logits(engine, engine.prefill(ids), method, tokens)
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_library_use_gives_the_tokens_of_the_engine(tiny, family):
    model, ids = tiny(family), random_prompt(PROMPT_TOKENS)
    engine = Engine(model, prefill_chunk_tokens=PROMPT_TOKENS)
    method = ShadowKV(rank=min(12, engine.dims.width), budget=64, outliers=2)
    mine = engine.generate(ids, method, 24)[0]
    theirs = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        **through(model, new_cache(method, model)),
    )
    assert theirs[0, PROMPT_TOKENS:].tolist() == mine


@pytest.mark.parametrize("family", ["llama", "gemma3", "glm"])
def test_left_padded_rows_answer_as_they_do_alone(tiny, family):
    model = tiny(family)
    prompts = [random_prompt(n, seed=n) for n in (190, 257, 300)]
    ids = torch.zeros(3, 300, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, 300 - prompt.shape[1] :] = prompt
        mask[row, 300 - prompt.shape[1] :] = 1
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    for method in (Full(), ShadowKV(rank=12, budget=64, outliers=2)):
        together = model.generate(ids, attention_mask=mask, **through(model, new_cache(method, model)), **options)
        for row, prompt in enumerate(prompts):
            alone = Engine(model, prefill_chunk_tokens=512).generate(prompt, method, 16)[0]
            assert together[row, 300:].tolist() == alone


def test_chunks_of_a_prompt_are_given_no_mask_where_none_is_needed(tiny, monkeypatch):
    masks = []

    def noted(q, k, v, mask, scaling):
        masks.append(mask)
        return dense_attention(q, k, v, mask, scaling)

    monkeypatch.setattr("shadowkv.engine.recording.dense_attention", noted)
    for family in ("llama", "gemma3"):
        model, ids = tiny(family), random_prompt(PROMPT_TOKENS)
        masks.clear()
        Engine(model, prefill_chunk_tokens=128).prefill(ids)
        # Only a window needs one, in each of its chunks that does not fit into it.
        windows = [window for window in sliding_windows(model.config) if window is not None]
        assert sum(mask is not None for mask in masks) == 3 * len(windows)


def test_other_caches_can_be_given_a_prompt_in_chunks(tiny):
    model, ids = tiny("llama"), random_prompt(PROMPT_TOKENS)
    attach(model)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        whole = model(ids).logits
        parts = [model(part, **through(model, cache)).logits for part in ids.split(128, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
def test_static_caches_have_room_that_no_query_sees(tiny, family):
    model, ids = tiny(family), random_prompt(40)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    model.set_attn_implementation("sdpa")
    expected = model.generate(ids, **options)
    attach(model)
    cache = StaticCache(config=model.config, max_cache_len=60)
    assert torch.equal(model.generate(ids, **through(model, cache), disable_compile=True, **options), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_a_chunk_is_causal_to_its_end_on_a_gpu(dtype, bound, head_dim):
    torch.manual_seed(0)
    q = torch.randn(2, 8, 300, head_dim, dtype=dtype, device="cuda")
    k, v = torch.randn(2, 2, 2, 1000, head_dim, dtype=dtype, device="cuda")
    mask = torch.ones(300, 1000, dtype=torch.bool, device="cuda").tril(700)[None, None]
    exact = dense_attention(*(x.double() for x in (q, k, v)), mask, head_dim**-0.5)
    assert relative_error(dense_attention(q, k, v, None, head_dim**-0.5).double(), exact) < bound


def test_prefix_reuse_changes_nothing_to_the_bit(tiny):
    model, shared = tiny("gemma3"), random_prompt(250)
    prompts = [torch.cat((shared[:, :n], random_prompt(400 - n, seed=n)), dim=1) for n in (250, 200, 130, 10)]
    reusing, fresh = (
        Engine(model, prefill_chunk_tokens=32, record_queries=True),
        Engine(model, prefill_chunk_tokens=32, record_queries=True, reuse_prefix=False),
    )
    reused = []
    for ids in prompts:
        a, b = reusing.prefill(ids), fresh.prefill(ids)
        reused.append(a.reused_tokens)
        assert b.reused_tokens == 0
        assert torch.equal(a.logits, b.logits)
        for x, y in zip(a.recording.recorded, b.recording.recorded, strict=True):
            left, right = x.layer_kv(None, 0), y.layer_kv(None, 0)
            for name in ("k", "v", "q_tail"):
                assert torch.equal(getattr(left, name), getattr(right, name))
            if x.window is None:
                assert torch.equal(left.q_all, right.q_all)
                assert torch.equal(left.q_all[:, :, -64:], left.q_tail)
    assert reused == [0, 192, 128, 0]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3-longrope"])
def test_chunked_prefill_agrees_with_one_pass(tiny, family):
    model, ids = tiny(family), random_prompt(PROMPT_TOKENS)
    whole = Engine(model, prefill_chunk_tokens=4096).prefill(ids).logits
    assert relative_error(Engine(model, prefill_chunk_tokens=48).prefill(ids).logits, whole) < 1e-4


def test_a_growing_prompt_outgrows_the_reserved_buffers(tiny):
    model = tiny("llama")
    engine = Engine(model, prefill_chunk_tokens=32, record_queries=True)
    long = random_prompt(400)
    engine.prefill(long[:, :150])
    grown = engine.prefill(long)
    assert grown.reused_tokens == 128
    alone = Engine(model, prefill_chunk_tokens=32, record_queries=True).prefill(long)
    assert torch.equal(grown.logits, alone.logits)
    mine, theirs = (x.recording.recorded[1].layer_kv(None, 0).q_all for x in (grown, alone))
    assert mine.shape[2] == 400
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("record_queries", [False, True])
def test_the_bytes_of_a_snapshot_are_known_before_it_is_made(tiny, family, record_queries):
    engine = Engine(tiny(family), record_queries=record_queries)
    layers = [x.layer_kv(None, 0) for x in engine.prefill(random_prompt(100)).recording.recorded]
    held = sum(x.nbytes for kv in layers for x in (kv.k, kv.v, kv.q_all) if x is not None)
    assert engine.snapshot_bytes(100) == held


def test_queries_are_recorded_only_on_request(tiny):
    prefill = Engine(tiny("llama")).prefill(random_prompt(100))
    assert all(layer.layer_kv(None, 0).q_all is None for layer in prefill.recording.recorded)


@pytest.mark.parametrize(("family", "depths"), [("llama", [0, 0.5, 1]), ("gemma3", [0.5])])
def test_methods_are_told_how_deep_a_layer_lies_among_those_they_serve(tiny, family, depths, monkeypatch):
    seen = []
    monkeypatch.setattr(Full, "new_layer", lambda self, layer, kv, rope: seen.append(kv.depth))
    engine = Engine(tiny(family))
    engine.replay(engine.prefill(random_prompt(10)), Full())
    assert seen == depths


def test_generation_across_a_change_of_frequencies_is_refused(tiny):
    engine = Engine(tiny("phi3-longrope"))
    with pytest.raises(SkvError, match="frequencies change beyond 256"):
        engine.generate(random_prompt(250), Full(), 16)
    engine.generate(random_prompt(230), Full(), 16)


def test_decode_stops_at_stop_tokens_and_leaves_them_out(tiny):
    engine = Engine(tiny("llama"))
    ids = random_prompt(100)
    free = engine.generate(ids, Full(), 12)[0]
    stop = free[5]
    assert engine.generate(ids, Full(), 12, stop_ids={stop})[0] == free[: free.index(stop)]
    assert engine.generate(ids, Full(), 0)[0] == []


def test_an_old_prefill_cannot_be_replayed(tiny):
    engine = Engine(tiny("llama"))
    old = engine.prefill(random_prompt(100))
    engine.prefill(random_prompt(100, seed=1))
    with pytest.raises(ValueError, match="replaced"):
        engine.replay(old, Full())


def test_a_window_wider_than_the_context_counts_as_full(tiny):
    """Phi-3 declares one; Gemma-3 mixes both kinds of layer."""
    config = copy.deepcopy(tiny("mistral-sliding").config)
    assert sliding_windows(config) == [64] * 3
    config.sliding_window = 2 * config.max_position_embeddings
    assert sliding_windows(config) == [None] * 3
    assert sliding_windows(tiny("gemma3").config) == [48, None, 48]


def test_a_cache_of_a_replaced_prompt_is_refused(tiny):
    """Caches may show views of the prefill, which the next prefill writes over."""
    engine = Engine(tiny("llama"))
    cache = engine.replay(engine.prefill(random_prompt(50)), Full())
    engine.prefill(random_prompt(50, seed=1))
    with pytest.raises(ValueError, match="replaced"):
        engine.extend(cache, torch.tensor([[5]]))


def test_a_prompt_may_be_written_over_by_its_owner(tiny):
    engine, ids = Engine(tiny("llama"), prefill_chunk_tokens=64), random_prompt(400)
    engine.prefill(ids)
    ids[:, :200] = 7
    again = engine.prefill(ids)
    assert again.reused_tokens == 0
    assert torch.equal(again.logits, Engine(engine.model, prefill_chunk_tokens=64).prefill(ids).logits)


def test_a_drop_in_cache_that_was_only_given_a_prompt_knows_its_bytes_and_lets_go(tiny):
    model = tiny("llama")
    cache = new_cache(Full(), model)
    model.generate(random_prompt(300), **through(model, cache), max_new_tokens=1, do_sample=False)
    dense = 300 * 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, channels, bytes
    assert sum(cache.nbytes()) >= dense
    cache.close()
    assert sum(cache.nbytes()) == 0


def test_what_a_methods_cache_cannot_do_is_said_in_a_line(tiny):
    model, prompt = tiny("llama"), random_prompt(40)
    for asked in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "num_beams": 2}):
        with pytest.raises(SkvError, match="beam search cannot be done with this cache"):
            model.generate(prompt, **through(model, new_cache(ShadowKV(rank=8), model)), max_new_tokens=4, **asked)
    with pytest.raises(SkvError, match="taking tokens back"):
        new_cache(ShadowKV(rank=8), model).crop(3)


def test_padding_on_the_right_is_refused(tiny):
    model, prompt = tiny("llama"), random_prompt(40, batch=2)
    seen = torch.ones_like(prompt)
    seen[1, -5:] = 0
    with pytest.raises(SkvError, match="padding_side='left'"):
        model(prompt, attention_mask=seen, **through(model, new_cache(ShadowKV(rank=8), model)))


def test_a_cache_whose_step_failed_cannot_go_on(tiny, monkeypatch):
    engine = Engine(tiny("llama"))
    cache = engine.replay(engine.prefill(random_prompt(60)), Full())
    with monkeypatch.context() as broken:
        broken.setattr("shadowkv.tensors.ops.attend", _out_of_luck)
        with pytest.raises(RuntimeError, match="out of luck"):
            engine.extend(cache, torch.tensor([[5]]))
    with pytest.raises(ValueError, match="failed in a step"):
        engine.extend(cache, torch.tensor([[5]]))


def _out_of_luck(*_):
    raise RuntimeError("out of luck")
