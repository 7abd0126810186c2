"""The fast engine gives what the reference gives, step by step, whatever was resident before."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_models import FAMILIES, random_prompt

from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.kernels import slots
from shadowkv.kernels.slots import Regions
from shadowkv.methods.shadowkv.resident import ResidentLayer
from shadowkv.tensors import streams

SPECS = [
    "shadowkv:rank=12,budget=64,outliers=2,window=8",
    "shadowkv:rank=12,budget=64,outliers=0,local=0,window=1",
    "shadowkv:rank=20,budget=40,chunk=5,outliers=3,window=16",
    "shadowkv:rank=12,budget=64,outliers=2,window=8,values=int8",
    "shadowkv:rank=12,budget=64,outliers=2,window=8,values=int4,factors=int8",
    "shadowkv:rank=12,budget=64,outliers=2,window=8,values=fp8,offload=none",
    "shadowkv:energy=0.9,budget=32,window=3",
]


def both(engine, spec, prompt):
    prefill = engine.prefill(prompt)
    return [engine.replay(prefill, parse_method(f"{spec},engine={name}")) for name in ("reference", "fast")]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_decode_as_with_the_reference(tiny, family):
    engine = Engine(tiny(family), prefill_chunk_tokens=128)
    reference, fast = both(engine, "shadowkv:rank=12,budget=64,outliers=2,window=8", random_prompt(300))
    for token in random_prompt(30, seed=5).split(1, dim=1):
        torch.testing.assert_close(engine.extend(fast, token), engine.extend(reference, token), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_two_hundred_steps_equal_the_reference(tiny, spec):
    """Past the window, so that generated tokens become chunks, and past the spare room."""
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    reference, fast = both(engine, spec, random_prompt(150, batch=2))
    for token in random_prompt(200, batch=2, seed=5).split(1, dim=1):
        left, right = engine.extend(fast, token), engine.extend(reference, token)
        # Sums in another order, by which a code of few bits may fall to the other side.
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3 if "int" in spec else 1e-4)


def joined(engine, method, lengths):
    rows = []
    for tokens in lengths:
        rows.append(engine.replay(engine.prefill(random_prompt(tokens)), method))
        engine.forget()
    return engine.join(rows, method)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2], SPECS[4]])
def test_rows_at_different_places_decode_as_they_do_alone(tiny, spec):
    """Some give up a chunk in the same step as others, some in other steps, and the first one makes buffers grow."""
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    lengths = (158, 150, 97)
    reference, fast = (joined(engine, parse_method(f"{spec},engine={name}"), lengths) for name in ("reference", "fast"))
    layer = fast._shares[0].cache.layers[0]
    room = layer._coefficients[0].tokens
    for token in random_prompt(170, batch=3, seed=5).split(1, dim=1):
        left, right = engine.extend(fast, token), engine.extend(reference, token)
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3 if "int" in spec else 1e-4)
    assert layer._coefficients[0].tokens > room


def test_it_grows_beyond_its_spare_room(tiny):
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    reference, fast = both(engine, "shadowkv:rank=12,budget=64,outliers=2,window=8", random_prompt(100))
    layer = fast._shares[0].cache.layers[0]
    room = layer._coefficients[0].tokens
    for stream in random_prompt(room + 40, seed=5).split(200, dim=1):
        left, right = engine.extend(fast, stream), engine.extend(reference, stream)
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    assert layer._coefficients[0].tokens > room


@torch.inference_mode()
def test_a_chunk_chosen_again_is_not_filled_again(tiny, monkeypatch):
    """The same query twice: the second time everything is there, and nothing is written."""
    filled = []
    real = slots.plan_fill

    def counting(chosen, held):
        fill = real(chosen, held)
        filled.append(int((fill >= 0).sum()))
        return fill

    monkeypatch.setattr(slots, "plan_fill", counting)
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    cache = engine.replay(engine.prefill(random_prompt(300)), parse_method("shadowkv:rank=12,budget=64,engine=fast"))
    layer = cache._shares[0].cache.layers[0]
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16)
    layer.attend(q, k, k, 0.25)
    layer.attend(q, k, k, 0.25)
    assert filled == [2 * 8, 0]


def test_positions_that_were_never_written_do_not_matter(tiny, monkeypatch):
    """Buffers full of NaN to begin with."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    reference, fast = both(engine, "shadowkv:rank=12,budget=64,outliers=2,window=8", random_prompt(90))
    for token in random_prompt(40, seed=5).split(1, dim=1):
        torch.testing.assert_close(engine.extend(fast, token), engine.extend(reference, token), rtol=1e-4, atol=1e-4)


def test_values_are_fetched_before_all_other_work(tiny, monkeypatch):
    """A step waits for the bus: its copies must not queue behind what scores the other half of the batch."""
    asked = []

    def noted(device, *, first=False):
        asked.append(first)
        return streams.beside(device, first=first)

    monkeypatch.setattr("shadowkv.methods.shadowkv.resident.beside", noted)
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    _, fast = both(engine, SPECS[0], random_prompt(150))
    engine.extend(fast, random_prompt(1))
    assert asked == [True] * len(engine.layers)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_piece_of_the_batch_attends_before_anything_waits_for_the_next(tiny, monkeypatch, count):
    """In the order in which a stream is given it: what is queued behind a wait waits."""
    queued = []

    def noting(name, at):
        real = getattr(slots, name)

        def operation(*arguments):
            queued.append(f"{name} of {len(arguments[at])}")
            return real(*arguments)

        monkeypatch.setattr(slots, name, operation)

    for name, at in (("chunk_scores", 0), ("fill_values", 1), ("fill_keys", 2), ("attend_resident", 0)):
        noting(name, at)

    @contextmanager
    def beside(device, *, first=False):
        yield lambda: queued.append("wait")

    monkeypatch.setattr("shadowkv.methods.shadowkv.resident.beside", beside)
    monkeypatch.setattr(ResidentLayer, "_pieces", lambda self, batch: count)
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    reference, fast = both(engine, SPECS[0], random_prompt(150, batch=5))
    token = random_prompt(1, batch=5, seed=5)
    torch.testing.assert_close(engine.extend(fast, token), engine.extend(reference, token), rtol=1e-4, atol=1e-4)
    rows = {1: [5], 2: [2, 3], 3: [1, 2, 2]}[count]
    placed = [f"{name} of {n}" for n in rows for name in ("chunk_scores", "fill_values")]
    finished = [said for n in rows for said in (f"fill_keys of {n}", "wait", f"attend_resident of {n}")]
    assert queued == (placed + finished) * len(engine.layers)


@pytest.mark.parametrize("spec", ["", ",values=int8", ",values=int4", ",offload=none"])
def test_a_batch_is_divided_by_the_bytes_that_a_plan_has_for_the_bus(tiny, spec):
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    method = parse_method(f"shadowkv:rank=12,budget=64{spec},engine=fast")
    layers = engine.replay(engine.prefill(random_prompt(300)), method)._shares[0].cache.layers.values()
    assert sum(layer.fetched_bytes for layer in layers) == pytest.approx(method.bus_bytes(engine.dims, 300), abs=1)


def test_the_ring_wraps_around():
    regions = Regions(slots=4, outliers=2, ring=5)
    spans = torch.tensor([[4, 2, 3, 4], [0, 1, 0, 0]])
    used = slots.positions_in_use(spans, regions)
    assert used[0].tolist() == [True] * 6 + [True, True, False, True, True]
    assert used[1].tolist() == [False] * 4 + [True, False] + [False] * 5
