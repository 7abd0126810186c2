"""Batches put together from rows: each answers as it does alone, in as much memory, without B dense snapshots."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from test_methods import CASES
from tiny_models import random_prompt, tiny_model

from shadowkv.common.dims import Bytes
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.tensors.buffers import TokenBuffer
from shadowkv.tensors.stacking import Stackable, can_stack, stack

ROWS, STEPS = 3, 24
FAST = [spec for spec in CASES if spec.endswith("engine=fast") and "energy" not in spec]
RAGGED = ("duo", "infinigen", "xkv", "shadowkv:energy")  # rows differ in shape, or share nothing to stack


@pytest.fixture
def engine(tiny):
    return Engine(tiny("llama"), prefill_chunk_tokens=128, record_queries=True)


def joined(engine, prompts, method):
    """The batch, the first logits of each row, and what the rows held before they were joined."""
    rows, logits = [], []
    for prompt in prompts.split(1):
        prefill = engine.prefill(prompt, method.prefill)
        rows.append(engine.replay(prefill, method))
        logits.append(prefill.logits)
        engine.forget()
    held = sum((row.nbytes() for row in rows), Bytes(0, 0))
    return engine.join(rows, method), torch.cat(logits), held


def forced(engine, cache, stream):
    """Logits after each column of `stream` [B,T]."""
    return torch.stack([engine.extend(cache, column) for column in stream.split(1, dim=1)])


@pytest.mark.parametrize("spec", CASES)
def test_joined_rows_answer_as_they_do_alone(engine, spec):
    method = parse_method(spec)
    prompts = torch.cat([random_prompt(300, seed=s) for s in range(ROWS)])
    stream = torch.cat([random_prompt(STEPS, seed=50 + s) for s in range(ROWS)])
    cache, logits, held = joined(engine, prompts, method)
    assert cache.stacked == (not spec.startswith(RAGGED))
    for name in Bytes._fields:
        assert getattr(cache.nbytes(), name) == pytest.approx(getattr(held, name), rel=0.01), name
    together = forced(engine, cache, stream)
    greedy = engine.decode(joined(engine, prompts, method)[0], logits, STEPS)
    for row in range(ROWS):
        prefill = engine.prefill(prompts[row : row + 1])
        alone = forced(engine, engine.replay(prefill, method), stream[row : row + 1])
        assert ((together[:, row] - alone[:, 0]).norm() / alone.norm()).item() < 1e-4
        assert greedy[row] == engine.decode(engine.replay(prefill, method), prefill.logits, STEPS)[0]
    assert len(set(map(tuple, greedy))) == ROWS, "rows that answer alike would prove nothing"


@pytest.mark.parametrize("family", ["gemma3", "mistral-sliding", "glm", "phi3-longrope"])
@pytest.mark.parametrize("spec", ["full", "shadowkv:rank=12,budget=64,outliers=2,window=8"])
def test_layers_with_a_window_are_joined_too(tiny, family, spec):
    engine = Engine(tiny(family), prefill_chunk_tokens=128)
    method = parse_method(spec)
    prompts = torch.cat([random_prompt(300, seed=s) for s in range(ROWS)])
    cache, logits, _ = joined(engine, prompts, method)
    together = engine.decode(cache, logits, STEPS)
    assert together == [engine.generate(row, method, STEPS)[0] for row in prompts.split(1)]


@pytest.mark.parametrize("spec", CASES)
def test_rows_let_go_of_their_dense_snapshot(engine, spec):
    """What a row keeps alive, in storages and not in views, is what it says it holds."""
    method = parse_method(spec)
    prefill = engine.prefill(random_prompt(1200))
    snapshot = weakref.ref(prefill.recording)
    row = engine.replay(prefill, method)
    engine.forget()
    del prefill
    row.usable = lambda: True
    cache = engine.join([row], method)
    del row
    gc.collect()
    assert snapshot() is None
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(cache._shares)}
    assert sum(storages.values()) <= sum(cache.nbytes()) * 1.02


def tensors_of(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        yield from (t for item in thing.values() for t in tensors_of(item))
    elif isinstance(thing, list | tuple):
        yield from (t for item in thing for t in tensors_of(item))
    elif type(thing).__module__.startswith("shadowkv.") and type(thing).__name__ != "Rope":
        yield from tensors_of(getattr(thing, "__dict__", {}))


@pytest.mark.parametrize("spec", CASES)
def test_rows_of_different_lengths_answer_as_they_do_alone(engine, spec):
    method = parse_method(spec)
    lengths = (300, 211, 96)
    prompts = [random_prompt(tokens, seed=tokens) for tokens in lengths]
    stream = torch.cat([random_prompt(STEPS, seed=50 + s) for s in range(ROWS)])
    rows, alone = [], []
    for prompt, fed in zip(prompts, stream.split(1), strict=True):
        prefill = engine.prefill(prompt, method.prefill)
        alone.append(forced(engine, engine.replay(prefill, method), fed))
        rows.append(engine.replay(prefill, method))
        engine.forget()
    cache = engine.join(rows, method)
    assert cache.row_tokens == list(lengths)
    if spec.endswith("engine=fast") and "energy" not in spec:
        assert cache.stacked
    together = forced(engine, cache, stream)
    for row in range(ROWS):
        assert ((together[:, row] - alone[row][:, 0]).norm() / alone[row].norm()).item() < 1e-4
    assert cache.row_tokens == [tokens + STEPS for tokens in lengths]


@pytest.mark.parametrize("spec", ["full", "full:engine=fast", "quest:budget=64", *FAST])
def test_rows_leave_and_others_join(engine, spec):
    """Three rows; one leaves; another batch joins: each row goes on as if it were alone."""
    method = parse_method(spec)
    prompts = [random_prompt(tokens, seed=tokens) for tokens in (150, 300, 211, 97)]
    stream = [random_prompt(20, seed=50 + s) for s in range(4)]

    def begun(number):
        cache = engine.replay(engine.prefill(prompts[number]), method)
        engine.forget()
        return cache

    alone = [forced(engine, begun(number), stream[number]) for number in range(4)]

    def check(cache, spans):
        """Feed each row the tokens of its span."""
        fed = torch.cat([stream[n][:, begin:end] for n, (begin, end) in spans.items()])
        together = forced(engine, cache, fed)
        for place, (n, (begin, end)) in enumerate(spans.items()):
            wanted = alone[n][begin:end, 0]
            assert ((together[:, place] - wanted).norm() / wanted.norm()).item() < 1e-4

    cache = engine.join([begun(n) for n in (0, 1, 2)], method)
    check(cache, {0: (0, 7), 1: (0, 7), 2: (0, 7)})
    cache = engine.keep(cache, method, [0, 2])
    check(cache, {0: (7, 12), 2: (7, 12)})
    cache = engine.join([cache, begun(3)], method)
    check(cache, {0: (12, 18), 2: (12, 18), 3: (0, 6)})


def test_models_with_windows_keep_rows_of_one_length_together(tiny):
    engine, method = Engine(tiny("gemma3"), prefill_chunk_tokens=128), parse_method("full")

    def begun(tokens, seed=0):
        cache = engine.replay(engine.prefill(random_prompt(tokens, seed=seed)), method)
        engine.forget()
        return cache

    with pytest.raises(SkvError, match="different lengths"):
        engine.join([begun(200), begun(201)], method)
    batch = engine.join([begun(200, seed=1), begun(200, seed=2)], method)
    with pytest.raises(SkvError, match="taken out"):
        engine.keep(batch, method, [0])


class Thing(Stackable):
    def __init__(self, row, settings=(1, None)):
        self.x = torch.full((1, 2), float(row))
        self.pair = (torch.full((1, 3), float(row)), {"inner": TokenBuffer(torch.full((1, 2, 4), float(row)), axis=2)})
        self.settings = settings


def test_stacking_goes_into_containers_and_empties_the_rows():
    rows = [Thing(row) for row in range(3)]
    assert can_stack(rows)
    one = stack(rows)
    assert one.x[:, 0].tolist() == one.pair[0][:, 0].tolist() == [0, 1, 2]
    assert one.pair[1]["inner"].view[:, 0, 0].tolist() == [0, 1, 2]
    assert all(not vars(row) for row in rows)


def test_rows_that_differ_are_not_stacked():
    assert not can_stack([Thing(0), Thing(1, settings=(2, None))])
    longer = Thing(1)
    longer.pair[1]["inner"].append(torch.zeros(1, 2, 1))
    assert not can_stack([Thing(0), longer])


def test_an_engine_that_forgot_computes_the_same_again():
    engine = Engine(tiny_model("llama"), prefill_chunk_tokens=64)
    first = engine.prefill(random_prompt(200))
    kept = first.recording.recorded[0].layer_kv(None, 0).k.clone()
    engine.forget()
    second = engine.prefill(random_prompt(200, seed=1))
    assert torch.equal(first.recording.recorded[0].layer_kv(None, 0).k, kept), "a forgotten snapshot is not written to"
    assert not torch.equal(first.logits, second.logits)
