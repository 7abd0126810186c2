"""Contracts of every method, over the registry: a file in shadowkv/methods/ is tested by being there."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from tiny_models import at_its_bound, random_prompt

from shadowkv.common.dims import Bytes
from shadowkv.contract.method import Method
from shadowkv.contract.registry import methods, parse_method
from shadowkv.engine.engine import Engine

# Settings small enough to leave things out at 300 tokens. A method not listed is tested at its defaults.
SMALL = {
    "duo": ["duo:sinks=4,recent=24", "duo:sinks=0,recent=16,retrieval=0.2", "duo:sinks=33,recent=1,retrieval=0.0"],
    "full": [
        "full",
        "full:engine=fast",
        "full:kv=int8",
        "full:kv=fp8",
        "full:kv=int8,engine=fast",
        "full:kv=fp8,engine=fast",
    ],
    "infinigen": [
        "infinigen:budget=40,dense_layers=1",
        "infinigen:budget=32,alpha=1.5,ratio=0.5,dense_layers=1,reduce=group_max",
        "infinigen:budget=300,alpha=0,ratio=0.1",
    ],
    "kivi": ["kivi:group=8,residual=32", "kivi:bits=4,group=16,residual=64", "kivi:bits=8,group=2,residual=2"],
    "shadowkv": [
        "shadowkv:rank=12,budget=64,outliers=2,window=8",
        "shadowkv:energy=0.9,budget=32,local=0,window=3",
        "shadowkv:rank=12,budget=64,outliers=2,window=8,values=int8",
        "shadowkv:rank=12,budget=64,outliers=2,window=8,values=fp8",
        "shadowkv:rank=12,budget=64,outliers=2,window=8,values=int4,offload=none,factors=int8",
        "shadowkv:rank=12,budget=64,outliers=2,window=8,engine=fast",
        "shadowkv:energy=0.9,budget=32,local=0,window=3,engine=fast",
        "shadowkv:rank=12,budget=40,outliers=2,window=8,chunk=5,values=int4,offload=none,factors=int8,engine=fast",
    ],
    "snapkv": [
        "snapkv:budget=64,window=16",
        "snapkv:budget=48,window=32,kernel=7,pooling=max,reduce=group_max",
    ],
    "pyramidkv": ["pyramidkv:budget=64,window=16", "pyramidkv:budget=48,window=8,beta=2,pooling=max"],
    "loki": [
        "loki:basis=prompt,budget=48",
        "loki:basis=prompt,budget=32,rank=3,reduce=group_max",
        "loki:basis=prompt,budget=32,rank=16,reduce=group_sum",
    ],
    "streaming": [
        "streaming:budget=64",
        "streaming:budget=40,sinks=8,rerotate=false",
        "streaming:budget=16,sinks=0",
    ],
    "oracle": [
        "oracle:budget=32",
        "oracle:budget=48,reduce=group_max",
        "oracle:top_p=0.9",
        "oracle:top_p=0.8,reduce=group_mean",
    ],
    "tova": ["tova:budget=64", "tova:budget=9"],
    "h2o": [
        "h2o:budget=64",
        "h2o:budget=48,recent=8",
        "h2o:budget=40,recent=20,evict=greedy",
        "h2o:budget=32,recent=32",
    ],
    "quest": [
        "quest:budget=64,dense_layers=1",
        "quest:budget=48,reduce=group_max",
        "quest:budget=32,reduce=group_sum",
        "quest:budget=32,offload=true",
        "quest:budget=64,dense_layers=1,engine=fast",
        "quest:budget=32,page=5,dense_layers=0,reduce=group_sum,engine=fast",
    ],
    "xkv": [
        "xkv:group=2,rank_k=20,rank_v=24",
        "xkv:rank_k=48,rank_v=60",
        "xkv:group=1,rank_k=10,rank_v=12",
        "xkv:group=2,rank_k=20,rank_v=24,select=true,budget=64,outliers=2",
        "xkv:group=2,rank_k=12,rank_v=64,select=true,budget=32,chunk=4,local=0,outliers=0",
    ],
}
CASES = [spec for name in methods() for spec in SMALL.get(name, [name])]


@pytest.fixture
def engine(tiny):
    return Engine(tiny("llama"), prefill_chunk_tokens=128, record_queries=True)


@pytest.mark.parametrize("spec", CASES)
def test_labels_are_canonical_and_read_back(spec):
    method = parse_method(spec)
    assert parse_method(method.label) == method
    assert set(method.params()) == {f.name for f in fields(method)}
    assert method.summary
    assert method.paper


@pytest.mark.parametrize("spec", CASES)
def test_methods_are_frozen(spec):
    method = parse_method(spec)
    for f in fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, f.name, None)
        break


@pytest.mark.parametrize("spec", CASES)
def test_the_snapshot_is_untouched_and_order_does_not_matter(engine, spec):
    method, other = parse_method(spec), parse_method("shadowkv:rank=8,budget=32")
    prefill = engine.prefill(random_prompt(300))
    before = [tuple(x.clone() for x in r.layer_kv(None, 0)[:3]) for r in prefill.recording.recorded]
    first = engine.decode(engine.replay(prefill, method), prefill.logits, 40)
    engine.decode(engine.replay(prefill, other), prefill.logits, 40)
    again = engine.decode(engine.replay(prefill, method), prefill.logits, 40)
    assert first == again
    for kept, layer in zip(before, prefill.recording.recorded, strict=True):
        for x, y in zip(kept, layer.layer_kv(None, 0)[:3], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("spec", CASES)
def test_rows_of_a_batch_are_independent(engine, spec):
    method = parse_method(spec)
    if getattr(method, "energy", 0):
        pytest.skip("the rank is the largest one that any row needs")
    prompts = torch.cat([random_prompt(300, seed=s) for s in (1, 2, 3)])
    prefill = engine.prefill(prompts)
    together = engine.decode(engine.replay(prefill, method), prefill.logits, 24)
    alone = [engine.generate(prompts[i : i + 1], method, 24)[0] for i in range(3)]
    assert together == alone


@pytest.mark.parametrize("spec", CASES)
def test_many_tokens_at_once_equal_one_by_one(engine, spec):
    """A second turn: T new tokens in one forward, at any point of a generation."""
    method, turn = parse_method(spec), random_prompt(45, seed=9)
    prefill = engine.prefill(random_prompt(300))
    at_once, one_by_one = engine.replay(prefill, method), engine.replay(prefill, method)
    for length in (13, 45):
        left = engine.extend(at_once, turn[:, :length])
        for token in turn[:, :length].split(1, dim=1):
            right = engine.extend(one_by_one, token)
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", CASES)
def test_generation_outlives_every_buffer(engine, spec):
    """1100 tokens: past every growth step (256) and many windows, and still attending to all it should."""
    method = parse_method(spec)
    prefill = engine.prefill(random_prompt(96))
    cache = engine.replay(prefill, method)
    stream = random_prompt(1100, seed=4)
    logits = engine.extend(cache, stream)
    assert cache.get_seq_length() == 96 + 1100
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", methods())
def test_lossless_stays_lossless_over_a_long_generation(engine, name):
    method = methods()[name]().lossless(engine.dims, 96 + 700)
    if method is None:
        pytest.skip(f"{name} declares no lossless setting")
    prompt, stream = random_prompt(96), random_prompt(700, seed=4)
    got = engine.extend(engine.replay(engine.prefill(prompt), method), stream)
    dense = engine.prefill(torch.cat((prompt, stream), dim=1)).logits
    assert ((got - dense).norm() / dense.norm()).item() < 1e-4


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("tokens", [1, 5, 31, 33, 65])
def test_short_prompts_work(engine, spec, tokens):
    assert len(engine.generate(random_prompt(tokens), parse_method(spec), 20)[0]) == 20


@pytest.mark.parametrize("spec", CASES)
def test_planned_bytes_are_held_bytes(engine, spec):
    """The slope of nbytes() over the prompt length is the planner's formula."""
    method = at_its_bound(parse_method(spec))

    def held(tokens: int) -> Bytes:
        cache = engine.replay(engine.prefill(random_prompt(tokens)), method)
        return cache.nbytes()

    short, long = held(640), held(1920)
    planned = method.bytes_per_token(engine.dims)
    for name in Bytes._fields:
        slope = (getattr(long, name) - getattr(short, name)) / 1280
        assert slope == pytest.approx(getattr(planned, name), rel=0.01), name


@pytest.mark.parametrize("spec", CASES)
def test_a_prompt_holds_what_was_planned(engine, spec):
    """Constant terms included, which the slope does not see; device and host by themselves."""
    method = at_its_bound(parse_method(spec))
    for tokens in (60, 700, 1501):
        cache = engine.replay(engine.prefill(random_prompt(tokens)), method)
        parts, held = method.memory_parts(engine.dims, tokens), cache.nbytes()
        assert sum(parts.values(), Bytes(0, 0)) == method.prompt_bytes(engine.dims, tokens)
        for name, planned, counted in zip(Bytes._fields, method.prompt_bytes(engine.dims, tokens), held, strict=True):
            assert planned == pytest.approx(counted, rel=0.01), (name, tokens)


@pytest.mark.parametrize("spec", CASES)
def test_a_plan_through_a_sparse_prefill_is_that_of_the_method(engine, spec):
    method, sparse = parse_method(spec), parse_method(f"{spec}+minference")
    for asked in ("memory_parts", "prompt_bytes", "workspace_bytes", "read_bytes", "bus_bytes", "step_flop"):
        assert getattr(sparse, asked)(engine.dims, 700) == getattr(method, asked)(engine.dims, 700)


@pytest.mark.parametrize("spec", CASES)
def test_nbytes_counts_every_tensor_reachable_from_the_cache(engine, spec):
    """Walk the object graph of the method's cache: no tensor may be missing from the count."""
    method = parse_method(spec)
    prefill = engine.prefill(random_prompt(300))
    cache = engine.replay(prefill, method)
    engine.decode(cache, prefill.logits, 30)
    seen: dict[tuple[int, int], int] = {}

    def walk(thing: object) -> None:
        if isinstance(thing, torch.Tensor):
            # Views of the read-only prefill count for what they show, everything else for what it stores.
            seen[(thing.data_ptr(), thing.numel())] = thing.numel() * thing.element_size()
        elif isinstance(thing, dict):
            for item in thing.values():
                walk(item)
        elif isinstance(thing, list | tuple):
            for item in thing:
                walk(item)
        elif type(thing).__module__.startswith("shadowkv.") and not isinstance(thing, Method):
            if type(thing).__name__ not in ("Rope", "TokenBuffer"):
                walk(vars(thing))
            elif type(thing).__name__ == "TokenBuffer":
                data = thing._data if thing._owned else thing.view  # type: ignore[attr-defined]
                walk(data)

    walk(cache._shares)
    assert sum(seen.values()) == sum(cache.nbytes())


@pytest.mark.parametrize("spec", CASES)
def test_degenerate_values_give_finite_answers(engine, spec):
    """Constant keys, zero values, duplicated tokens."""
    prompt = torch.full((1, 300), 7)
    assert len(engine.generate(prompt, parse_method(spec), 20)[0]) == 20
    cache = engine.replay(engine.prefill(prompt), parse_method(spec))
    assert torch.isfinite(engine.extend(cache, torch.full((1, 9), 7))).all()


@pytest.mark.parametrize("spec", CASES)
def test_bf16_models_work(spec):
    from tiny_models import tiny_model

    engine = Engine(tiny_model("llama", dtype=torch.bfloat16), prefill_chunk_tokens=128, record_queries=True)
    assert len(engine.generate(random_prompt(300), parse_method(spec), 20)[0]) == 20


@pytest.mark.parametrize("spec", CASES)
def test_closing_lets_go(engine, spec):
    cache = engine.replay(engine.prefill(random_prompt(300)), parse_method(spec))
    cache.close()
    assert sum(cache.nbytes()) == 0
