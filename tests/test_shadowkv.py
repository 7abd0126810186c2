"""What only ShadowKV promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import random_prompt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shadowkv.anatomy.rope import Rope
from shadowkv.contract.method import LayerKV
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full
from shadowkv.methods.shadowkv.landmarks import Landmarks
from shadowkv.methods.shadowkv.method import ShadowKV
from shadowkv.tensors import ops

METHOD = ShadowKV(rank=12, budget=64, outliers=5)


@pytest.fixture
def kv(tiny):
    return Engine(tiny("llama")).prefill(random_prompt(300)).recording.recorded[1].layer_kv(None, 0)


@pytest.fixture
def rope(tiny):
    return Rope(tiny("llama"))


def test_outliers_and_landmarks_partition_the_context(kv, rope):
    state = METHOD.new_layer(1, kv, rope)
    chunks = 300 // 8 - 4
    for head in range(2):
        regular = set(state._landmarks.numbers.view[0, head].tolist())
        kept = state._outlier_k[0, head].view(5, 8, 16)
        outliers = {c for c in range(chunks) if any(torch.equal(kv.k[0, head, c * 8 : c * 8 + 8], o) for o in kept)}
        assert len(outliers) == 5
        assert not regular & outliers
        assert regular | outliers == set(range(chunks))


def test_outliers_are_the_worst_summarised_chunks_whatever_the_scale_of_keys(kv, rope):
    chunks = kv.k[:, :, : 33 * 8].view(1, 2, 33, 8, 16)
    cosine = torch.nn.functional.cosine_similarity(chunks, chunks.mean(3, keepdim=True), dim=-1).amin(-1)
    worst = cosine.argsort(dim=-1)[..., :5].sort(-1).values
    for scale in (1.0, 37.0):
        state = METHOD.new_layer(1, kv._replace(k=kv.k * scale), rope)
        torch.testing.assert_close(state._outlier_k, ops.gather_tokens(kv.k * scale, ops.token_indices(worst, 8)))


def test_selection_depends_on_neither_rank_nor_values(kv, rope):
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
    chosen = []
    for rank, values in ((12, kv.v), (3, kv.v), (12, torch.randn_like(kv.v))):
        state = ShadowKV(rank=rank, budget=64, outliers=5).new_layer(1, kv._replace(v=values), rope)
        keys, _ = state._select(q, 0.25)
        scores = ops.chunk_scores(q, state._landmarks.means.view, 0.25)
        chosen.append(state._landmarks.numbers.view.gather(2, ops.top_indices(scores, 8)))
        assert keys.shape == (1, 2, 64, 16)
        assert torch.isfinite(state.attend(q, k, v, 0.25)).all()
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])


def test_full_rank_rebuilds_exact_keys_and_error_falls_with_rank(kv, rope):
    q, errors = torch.randn(1, 4, 1, 16), []
    for rank in (2, 8, 20, 32):
        state = ShadowKV(rank=rank, budget=64, outliers=5).new_layer(1, kv, rope)
        scores = ops.chunk_scores(q, state._landmarks.means.view, 0.25)
        chunks = state._landmarks.numbers.view.gather(2, ops.top_indices(scores, 8)).long()
        index = ops.token_indices(chunks, 8)
        keys, values = state._select(q, 0.25)
        errors.append((keys - ops.gather_tokens(kv.k, index)).norm().item())
        assert torch.equal(values, ops.gather_tokens(kv.v, index))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_values_are_counted_on_the_host_and_factors_on_the_device(kv, rope):
    held = METHOD.new_layer(1, kv, rope).nbytes()
    context = (300 // 8 - 4) * 8
    assert held.host == context * 32 * 4
    tail, outliers = 300 - context, 5 * 8
    exact = 2 * (tail + outliers) * 32 * 4
    landmarks = (context // 8 - 5) * 2 * (16 * 4 + 4)
    factors = (context * 12 + 12 * 32) * 4
    assert held.device == exact + landmarks + factors


def test_generated_tokens_become_chunks_after_the_window(kv, rope):
    state = ShadowKV(rank=32, budget=64, outliers=5, window=16).new_layer(1, kv, rope)
    tail = 300 - (300 // 8 - 4) * 8
    before = len(state._landmarks)
    for _ in range(16 + 8 * 3):
        state.attend(torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0.25)
    assert len(state._landmarks) == before + 3
    assert len(state._tail_k) == tail + 16
    assert state._landmarks.numbers.view[0, 0, -3:].tolist() == [33, 34, 35]


@pytest.mark.parametrize("factors", ["native", "bf16", "int8"])
def test_factors_of_later_tokens_are_as_good_as_those_of_the_prompt(factors):
    """Directions of very unequal size, as real keys have; rank and type are all that may cost anything."""
    from shadowkv.methods.shadowkv.key_factors import KeyFactors

    torch.manual_seed(0)
    x = torch.randn(2, 400, 32) @ (torch.linalg.qr(torch.randn(32, 32)).Q * torch.logspace(1, -2, 32)[:, None])
    held = KeyFactors.of(lambda first, end: x[:, first:end], 300, 300, 24, 0.0, factors, torch.float32)
    held.append(x[:, 300:])
    index = torch.arange(400).expand(2, 1, 400)
    error = (held.rebuild(index)[:, 0] - x).norm(dim=-1) / x.norm(dim=-1)
    assert error[:, :300].mean() < 0.02
    assert error[:, 300:].mean() < 1.2 * error[:, :300].mean()


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_nothing_is_fitted_to_made_up_keys(kv, rope, monkeypatch, engine):
    method = replace(METHOD, engine=engine)
    fitted = method.new_layer(1, kv, rope)
    monkeypatch.setattr("shadowkv.tensors.low_rank.fit", lambda *_: pytest.fail("noise is worth no time"))
    made_up = [method.new_layer(1, kv._replace(made_up=True), rope) for _ in range(2)]
    first, second = (layer._factors.vectors for layer in made_up)
    assert torch.equal(first, second), "the same every time"
    assert first.shape == fitted._factors.vectors.shape
    torch.testing.assert_close(first @ first.mT, torch.eye(METHOD.rank)[None], atol=1e-5, rtol=0)
    assert made_up[0].nbytes() == fitted.nbytes()


@pytest.mark.parametrize("family", ["llama", "phi3-longrope"])
@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_blocks_of_a_prompt_make_up_the_whole(tiny, monkeypatch, family, engine):
    """The first blocks end before the frequencies of longrope change, which their prompt does not."""
    runs = Engine(tiny(family))
    prefill = runs.prefill(random_prompt(300))
    exact = replace(ShadowKV(engine=engine).lossless(runs.dims, 400), local=1)
    stream = random_prompt(6, seed=7)
    monkeypatch.setattr("shadowkv.tensors.low_rank.BLOCK_TOKENS", 64)
    caches = [runs.replay(prefill, method) for method in (exact, Full())]
    for token in stream.split(1, dim=1):
        torch.testing.assert_close(*(runs.extend(cache, token) for cache in caches), rtol=1e-3, atol=1e-3)


def test_landmarks_of_blocks_are_those_of_the_whole(kv, monkeypatch):
    keys = kv.k[:, :, :264]
    whole, worst = Landmarks.of(keys, 8, 5)
    monkeypatch.setattr("shadowkv.methods.shadowkv.landmarks._BLOCK_TOKENS", 64)
    blocks, same = Landmarks.of(keys, 8, 5)
    assert torch.equal(same, worst)
    assert torch.equal(blocks.numbers.view, whole.numbers.view)
    torch.testing.assert_close(blocks.means.view, whole.means.view)


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_no_prompt_is_copied_as_a_whole_in_fp32(tiny, engine):
    """At a million tokens a layer's keys take 4 GiB in fp32, as often as a formula has terms."""
    rope, tokens = Rope(tiny("llama")), 40_000
    k, v = torch.randn(2, 1, 8, tokens, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.element_size() > 2)
            return out

    with Watch():
        ShadowKV(rank=8, budget=64, engine=engine).new_layer(1, LayerKV(k, v, k[:, :, -64:], 0.25), rope)
    assert made
    assert max(made) < k.numel() * torch.float32.itemsize // 2
