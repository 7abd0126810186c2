"""Fair comparisons: what a method says it attends to is what it attends to, and one budget can be given to all."""

from __future__ import annotations

import pytest
from test_methods import CASES
from test_selection import _SMALL, DIM, HEADS, PROMPT, Spelled
from tiny_models import geometry_model

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Dims
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import methods, parse_method
from shadowkv.models.model_size import model_size

DIMS = Dims(layers=4, q_heads=6, kv_heads=2, head_dim=64, element_bytes=4)


@pytest.mark.parametrize("name", _SMALL)
@pytest.mark.parametrize("budget", [None, 96])
def test_attended_tokens_are_counted_right(name, budget):
    """By values that spell their positions, in a layer that chooses; the new token comes on top where it is kept."""
    stream, model = Spelled(group=3, steps=1), geometry_model(3, DIM)
    method = methods()[name](**_SMALL[name])
    if budget is not None:
        method = method.with_budget(budget)
    chosen = (stream.weights(method, Rope(model)) > 0).sum(-1)
    assert chosen.max() == chosen.min(), "every head attends to as many"
    dims = model_size(model.config, 4, device="cpu").dims
    choosing = Dims(1, HEADS * 3, HEADS, DIM, dims.element_bytes, served=(2,))
    expected = method.attended_tokens(choosing, PROMPT)
    if name == "quest":  # its newest page is not full
        assert expected - method.page < chosen[0, 0] <= expected
    elif name == "pyramidkv":
        assert method.attended_tokens(DIMS, PROMPT) == pytest.approx(method.budget, abs=1)
    else:
        assert 0 <= chosen[0, 0] - expected <= 1
    if budget is not None and name != "pyramidkv":
        assert budget - 16 <= expected <= budget


@pytest.mark.parametrize("spec", CASES)
def test_a_budget_for_all_bounds_what_is_attended_to(spec):
    method = parse_method(spec)
    equal = method.with_budget(128)
    if equal is None:
        given = method.params()
        assert "budget" not in given or given.get("top_p") or given.get("select") is False
        return
    assert type(equal) is type(method)
    dims = Dims(4, 6, 2, 64, 4, served=(10, 11, 12, 13))  # beyond the first layers, which some leave dense
    assert 128 - 16 <= equal.attended_tokens(dims, 4000) <= 128
    assert equal.attended_tokens(dims, 40) <= 40
    assert parse_method(f"{spec}+minference").with_budget(128).method == equal
    changed = {key for key, value in equal.params().items() if method.params()[key] != value}
    assert changed <= {"budget", "alpha"}, "InfiniGen's threshold makes way"


def test_shadowkv_counts_outliers_and_local_chunks_in():
    method = parse_method("shadowkv").with_budget(512)
    assert method.budget + (method.outlier_chunks + method.local) * method.chunk <= 512
    assert method.budget == 400
    with pytest.raises(SkvError, match="leave no room beside"):
        parse_method("shadowkv:local=20").with_budget(128)


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("full", 0),
        ("quest:budget=64", 0),
        ("quest:budget=64,offload=true,dense_layers=1", 3 * 6 * 64),
        ("quest:budget=64,offload=true,reduce=group_max,dense_layers=1", 3 * 2 * 64),
        ("shadowkv:budget=64,rank=8", 4 * 2 * 64),
        ("infinigen:budget=50,dense_layers=1", 2 * 3 * 6 * 50),
    ],
)
def test_bytes_over_the_bus(spec, values):
    """Values (and keys) of one head and token have 64 elements of 4 bytes."""
    assert parse_method(spec).bus_bytes(DIMS, 1000) == values * 64 * 4


def test_what_is_fetched_is_what_was_said(monkeypatch):
    """Count the elements that a step of ShadowKV and of Quest with offloaded values really take from the host."""
    from shadowkv.tensors.stored import CodedTokens

    fetched = []
    real = CodedTokens.gather

    def counting(self, index):
        out = real(self, index)
        fetched.append(out.numel())
        return out

    monkeypatch.setattr(CodedTokens, "gather", counting)
    stream, model = Spelled(group=3, steps=1), geometry_model(3, DIM)
    method = methods()["shadowkv"](**_SMALL["shadowkv"])
    stream.weights(method, Rope(model))
    one_layer = Dims(1, HEADS * 3, HEADS, DIM, 4, served=(2,))
    assert sum(fetched) * 4 == method.bus_bytes(one_layer, PROMPT)


@pytest.mark.parametrize("budget", [128, 256, 504, 512, 1024])
@pytest.mark.parametrize("tokens", [4088, 4095])
def test_shadowkv_never_exceeds_a_given_budget(budget, tokens):
    assert budget - 16 <= parse_method("shadowkv").with_budget(budget).attended_tokens(DIMS, tokens) <= budget


@pytest.mark.parametrize(
    ("spec", "attended"),
    [
        ("full", 700), ("snapkv:budget=64", 164), ("pyramidkv:budget=64", 164), ("h2o:budget=64", 64),
        ("streaming:budget=64", 64), ("shadowkv:budget=64,outliers=2,local=1,window=20,rank=8", 64 + 24 + 27),
    ],
)  # fmt: skip
def test_later_tokens_count_where_they_are_kept(spec, attended):
    """After a prompt of 600 tokens and a turn of 100."""
    assert parse_method(spec).attended_tokens(DIMS, 600, 100) == pytest.approx(attended, abs=1)


def test_bus_bytes_where_everything_is_read():
    assert parse_method("quest:offload=true,dense_layers=0").bus_bytes(DIMS, 1000) == 4 * 2 * 1000 * 64 * 4
    short = parse_method("shadowkv:budget=1024,outliers=2,rank=8")
    assert short.bus_bytes(DIMS, 80) == 4 * 2 * (10 - 4 - 2) * 8 * 64 * 4


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("share", [0.6, 0.3])
def test_kv_bytes_for_all_bound_what_is_held(spec, share):
    """Close from below where memory can be chosen freely; what holds the same at any setting has nothing to choose."""
    dims = Dims(24, 6, 2, 64, 4)
    method, given = parse_method(spec), int(share * 4000 * dims.full_bytes_per_token)
    if spec.startswith("kivi"):
        method = parse_method("kivi")  # a scale and a zero for every two elements are more than is given here
    equal = method.with_kv_bytes(dims, 4000, given)
    if equal is None:
        assert method.name in ("full", "quest", "loki", "oracle", "infinigen")
        return
    assert type(equal) is type(method)
    equal.check(dims)
    held = equal.prompt_bytes(dims, 4000).device
    assert held <= given
    if method.name == "kivi":
        assert equal.bits == 8 if share == 0.6 else 4
    elif equal.params().get("rank") != dims.width:
        assert held > 0.96 * given
    assert parse_method(f"{method.label}+minference").with_kv_bytes(dims, 4000, given).method == equal
    assert parse_method(equal.label) == equal


@pytest.mark.parametrize("name", ["kivi", "xkv", "snapkv", "h2o", "shadowkv"])
def test_too_few_kv_bytes_are_refused_with_what_it_takes(name):
    with pytest.raises(SkvError, match=rf"{name}.* holds \d+\.\d MiB of 4000 tokens, more than was given"):
        parse_method(name).with_kv_bytes(DIMS, 4000, 1000)


def test_more_kv_bytes_than_full_attention_has_keep_everything():
    given = 2 * 4000 * DIMS.full_bytes_per_token
    assert parse_method("snapkv").with_kv_bytes(DIMS, 4000, given).budget == 4000
    assert parse_method("duo").with_kv_bytes(DIMS, 4000, given).retrieval == 1
    assert parse_method("shadowkv").with_kv_bytes(DIMS, 4000, given).rank == DIMS.width
    assert parse_method("kivi").with_kv_bytes(DIMS, 4000, given).bits == 8
