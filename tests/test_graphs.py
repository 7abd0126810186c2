"""A step as a graph: captured once, replayed, and captured anew where tensors moved."""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from run_folders import manifest
from tiny_models import random_prompt, tiny_model

from evals.bench.latency.report import latency_notes
from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.engine.graphs import GraphedStep, can_be_graphed, capture_on_gpu
from shadowkv.methods.shadowkv.resident import ResidentLayer
from shadowkv.tensors.stacking import Stackable

FAST = [
    "shadowkv:rank=12,budget=64,outliers=2,window=8,engine=fast",
    "full:engine=fast",
    "full:kv=int8,engine=fast",
    "full:kv=fp8,engine=fast",
    "quest:budget=64,dense_layers=1,engine=fast",
    "quest:budget=30,page=5,reduce=group_max,dense_layers=0,engine=fast",
]


def tensors(thing):
    """Every tensor held below `thing`."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors(value)
    elif isinstance(thing, Stackable) or hasattr(thing, "layers"):
        yield from tensors(vars(thing))


class FakeGraphs:
    """Captures as a GPU does, without computing anything: the step is run, and what it changed put back."""

    def __init__(self, cache):
        self.cache, self.captured, self.replayed = cache, 0, 0
        self.rearranging = [0, 0]  # of what comes before some steps: captured, replayed
        self.positions = None

    def stepper(self, engine):
        feed = GraphedStep(engine.model, engine.rope, self.cache, self)
        self.positions = feed._positions
        return feed

    def held(self):
        return [self.positions, *tensors([share.cache for share in self.cache._shares])]

    def __call__(self, step):
        before = [x.clone() for x in self.held()]
        result = step()
        for x, old in zip(self.held(), before, strict=True):
            x.copy_(old)
        if result is None:
            self.rearranging[0] += 1
        else:
            result.fill_(float("nan"))
            self.captured += 1
        places = [x.data_ptr() for x in self.held()]

        def replay():
            now = [x.data_ptr() for x in self.held()]
            assert now == places, "a graph writes to where tensors were when it was captured"
            if result is None:
                self.rearranging[1] += 1
                step()
            else:
                self.replayed += 1
                result.copy_(step())

        return replay, result


def batch(engine, method, lengths):
    rows = []
    for tokens in lengths:
        rows.append(engine.replay(engine.prefill(random_prompt(tokens)), method))
        engine.forget()
    return engine.join(rows, method)


@pytest.mark.parametrize("spec", FAST)
def test_replays_give_what_steps_give_and_graphs_are_made_anew_where_buffers_grew(tiny, spec):
    engine, method = Engine(tiny("llama"), prefill_chunk_tokens=128), parse_method(spec)
    prefill = engine.prefill(random_prompt(100, batch=2))
    plain, graphed = engine.replay(prefill, method), engine.replay(prefill, method)
    stream, first = random_prompt(200, batch=2, seed=5), 120  # the buffers have room for 128 tokens
    for cache in (plain, graphed):
        engine.extend(cache, stream[:, :first])
    graphs = FakeGraphs(graphed)
    feed = graphs.stepper(engine)
    for token in stream[:, first:].split(1, dim=1):
        torch.testing.assert_close(feed(token), engine.extend(plain, token), rtol=1e-4, atol=1e-4)
    assert graphs.captured == 2
    assert graphs.replayed == 80 - 2  # but for the first step, and the one in which buffers grew
    # Of ten chunks that went, the one that made buffers grow and the first of the other eight were run as they are.
    assert graphs.rearranging == ([2, 8] if "shadowkv" in spec else [0, 0])
    assert plain.row_tokens == graphed.row_tokens == [300] * 2
    assert plain.get_seq_length() == graphed.get_seq_length() == 300
    assert engine.extend(graphed, stream[:, :3]).isfinite().all()


@pytest.mark.parametrize("spec", FAST)
def test_ragged_rows_are_graphed_together(tiny, spec):
    engine, method = Engine(tiny("llama"), prefill_chunk_tokens=128), parse_method(spec)
    plain, graphed = (batch(engine, method, (150, 97)) for _ in range(2))
    feed = FakeGraphs(graphed).stepper(engine)
    for token in random_prompt(30, batch=2, seed=5).split(1, dim=1):
        torch.testing.assert_close(feed(token), engine.extend(plain, token), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(150, 150), (150, 97)])
def test_positions_are_counted_by_the_graph_itself(tiny, monkeypatch, lengths):
    """The host writes them where rows are not where its last step left them, and waits for the device nowhere else."""
    engine, method = Engine(tiny("llama"), prefill_chunk_tokens=128), parse_method("full:engine=fast")
    plain, graphed = (batch(engine, method, lengths) for _ in range(2))
    written = []
    real = torch.tensor

    def noting(data, *arguments, **named):
        if sys._getframe(1).f_code.co_filename.endswith("graphs.py"):
            written.append(data)
        return real(data, *arguments, **named)

    monkeypatch.setattr(torch, "tensor", noting)
    graphs = FakeGraphs(graphed)
    feed = graphs.stepper(engine)
    tokens = random_prompt(8, batch=2, seed=5).split(1, dim=1)
    for number, token in enumerate(tokens):
        if number == 5:  # a token that the graph does not see
            torch.testing.assert_close(engine.extend(graphed, token), engine.extend(plain, token))
        else:
            torch.testing.assert_close(feed(token), engine.extend(plain, token), rtol=1e-4, atol=1e-4)
    assert graphs.positions.flatten().tolist() == [tokens + 8 for tokens in lengths]
    assert written == [list(lengths), [tokens + 6 for tokens in lengths]]


def test_tables_that_a_graph_reads_stay_until_it_is_made_anew(tiny):
    """A longer cache of the same engine has longer tables made, which take the place of those."""
    engine, method = Engine(tiny("llama"), prefill_chunk_tokens=128), parse_method(FAST[0])
    caches = []
    for tokens in (150, 600):
        caches.append(engine.replay(engine.prefill(random_prompt(tokens)), method))
        engine.forget()
    short, long = caches
    feed = FakeGraphs(short).stepper(engine)
    for token in random_prompt(2, seed=5).split(1, dim=1):
        feed(token)
    (table,) = engine.rope.derived.values()
    read = weakref.ref(table.cos)
    del table
    engine.extend(long, random_prompt(1))
    gc.collect()
    assert [table.cos is read() for table in engine.rope.derived.values()] == [False]
    assert read() is not None
    del feed
    gc.collect()
    assert read() is None


def test_a_step_that_comes_to_wait_for_the_device_is_no_graph_any_more(tiny, monkeypatch):
    """Where buffers grew and the system refuses to pin the new ones, the host has to gather values from then on."""
    engine, method = Engine(tiny("llama"), prefill_chunk_tokens=128), parse_method(FAST[0])
    prefill = engine.prefill(random_prompt(100))
    plain, graphed = engine.replay(prefill, method), engine.replay(prefill, method)
    layer = graphed._shares[0].cache.layers[0]
    room = layer._coefficients[0].tokens
    monkeypatch.setattr(ResidentLayer, "capturable", property(lambda self: self._coefficients[0].tokens <= room))
    graphs = FakeGraphs(graphed)
    feed = graphs.stepper(engine)
    for token in random_prompt(170, seed=5).split(1, dim=1):
        torch.testing.assert_close(feed(token), engine.extend(plain, token), rtol=1e-4, atol=1e-4)
    assert layer._coefficients[0].tokens > room
    assert graphs.captured == 1


@pytest.fixture
def capturing(monkeypatch):
    """torch's capture without a GPU; its end complains of work on side streams that was not waited for."""
    there = SimpleNamespace(open=False, joined=True, replay=lambda: None)

    @contextmanager
    def capture(graph):
        there.open = True
        try:
            yield
        finally:  # as `torch.cuda.graph` has it, whatever happened within
            there.open = False
            if not there.joined:
                raise RuntimeError("capture has unjoined work")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: there)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr("shadowkv.engine.graphs.join_captured", lambda: setattr(there, "joined", True))
    return there


class Cycle:
    def __init__(self):
        self.myself = self


def test_nothing_is_collected_while_a_step_is_captured(capturing):
    """Memory of the host that a collection unregisters would end the capture."""
    collected_in = []
    weakref.finalize(Cycle(), lambda: collected_in.append(capturing.open))

    def step():
        assert not gc.isenabled()
        return torch.zeros(1)

    capture_on_gpu(step)
    assert collected_in == [False]
    assert gc.isenabled()


def test_a_capture_that_fails_says_what_went_wrong_in_the_step(capturing):
    """Not that its end found a side stream unjoined: memory that ends is a result, anything else an error."""

    def step():
        capturing.joined = False
        raise torch.OutOfMemoryError("no room for a block")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        capture_on_gpu(step)
    assert capturing.joined
    assert gc.isenabled()


def test_nor_does_a_join_that_fails_hide_it(capturing, monkeypatch):
    monkeypatch.setattr("shadowkv.engine.graphs.join_captured", lambda: 1 / 0)

    def step():
        capturing.joined = False
        raise torch.OutOfMemoryError("no room for a block")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        capture_on_gpu(step)


def test_a_step_that_fails_ends_the_cache(tiny, monkeypatch):
    engine, method = Engine(tiny("llama"), prefill_chunk_tokens=128), parse_method("full:engine=fast")
    cache = engine.replay(engine.prefill(random_prompt(50)), method)
    feed = FakeGraphs(cache).stepper(engine)
    monkeypatch.setattr("shadowkv.kernels.slots.attend_resident", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(random_prompt(1))
    with pytest.raises(ValueError, match="failed in a step"):
        feed(random_prompt(1))


@pytest.mark.parametrize(
    ("family", "spec", "graphed"),
    [
        ("llama", FAST[0], True),
        ("llama", FAST[1], True),
        ("llama", "full", False),
        ("llama", FAST[2], True),
        ("llama", "quest:budget=64", False),
        ("gemma3", FAST[1], False),  # layers with a window
        ("phi3-longrope", FAST[1], False),  # its rotary embedding looks at the length
    ],
)
def test_what_can_be_graphed(tiny, family, spec, graphed):
    engine = Engine(tiny(family), prefill_chunk_tokens=128)
    cache = engine.replay(engine.prefill(random_prompt(300)), parse_method(spec))
    assert can_be_graphed(engine.rope, cache) == graphed


@pytest.mark.gpu
@pytest.mark.parametrize("spec", FAST)
def test_graphs_on_a_gpu_give_what_steps_give(spec):
    """Capture fails on any wait for the device, so this is also the test that a step has none."""
    engine, method = Engine(tiny_model("llama").to("cuda"), prefill_chunk_tokens=128), parse_method(spec)
    prefill = engine.prefill(random_prompt(150, batch=2).cuda())
    plain, graphed = engine.replay(prefill, method), engine.replay(prefill, method)
    feed = engine.stepper(graphed)
    assert isinstance(feed, GraphedStep)
    for token in random_prompt(200, batch=2, seed=5).cuda().split(1, dim=1):
        torch.testing.assert_close(feed(token), engine.extend(plain, token), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("device", "said"), [("cpu", False), ("cuda:0", True)])
def test_a_profile_on_a_gpu_says_that_it_is_not_of_graphs(device, said):
    run = manifest("latency")
    notes = latency_notes(replace(run, model={**run.model, "device": device}), [])
    assert any("one CUDA graph" in note for note in notes) == said
