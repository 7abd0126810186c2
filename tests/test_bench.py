"""Sweeps on a tiny model: memory that ends, interruptions, turns, distributions, made-up keys, what is written."""

from __future__ import annotations

import gc
import json
import subprocess
from dataclasses import replace
from itertools import count, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_results import manifest
from tiny_models import at_its_bound, tiny_model

from evals.bench.conditions import conditions, noise_note
from evals.bench.engines import Began, SkvContender, TransformersContender
from evals.bench.latency.profile import PARTS, LatencyRecord, measure_latency, parts_of
from evals.bench.lists import parse_batches
from evals.bench.measuring import Bench
from evals.bench.memory import MemoryShortError, Room
from evals.bench.prompts import RealPrompts, SyntheticPrompts
from evals.bench.records import BenchRecord, Cell
from evals.bench.reuse import MadeHits, hit_rate
from evals.bench.throughput.report import notes_of, throughput_table
from evals.bench.throughput.summary import gains, summarise_bench
from evals.bench.throughput.sweep import Plan, doublings, ladder_cells, largest_fitting, run_sweep
from evals.bench.timing import distribution, paired_ratios, spread, step_times
from evals.common.sources import haystack
from evals.reporting.files import write_run
from evals.runs.results import open_records, read_records
from evals.tables.table import Table, latex
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import methods, parse_method
from shadowkv.engine.engine import Engine
from shadowkv.models.loading import load_tokenizer
from shadowkv.models.model_size import model_size
from shadowkv.models.presets import find_preset
from shadowkv.models.resolving import ModelSource
from shadowkv.planning.planner import demand_of, sequence_parts
from shadowkv.tensors import host_memory
from shadowkv.tensors.host_memory import available_host_bytes
from shadowkv.tensors.pinned import HostRows

SPECS = ["full", "shadowkv:rank=8,budget=64", "quest:budget=64"]
CONTEXT = 300
MANIFEST = manifest(
    benchmark="throughput",
    config={"steps": 4, "warmup_steps": 1, "synthetic_kv": False, "machine": "here"},
    selection={"repeats": 2},
    model={"name": "tiny", "dummy": False, "dtype": "float32", "device": "cpu"},
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))


@pytest.fixture(scope="module")
def engine(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    return Engine(model, prefill_chunk_tokens=128, reuse_prefix=False, record_queries=True)


@pytest.fixture
def prompts(engine, tokenizer):
    return RealPrompts(engine, tokenizer, haystack("synthetic").text, seed=0)


def room(engine, **changes):
    return replace(Room(torch.device("cpu"), model_size(engine.model.config, 4, device="cpu")), **changes)


def bench(engine, **changes):
    return Bench(engine, room(engine, **changes), "here", warmup_steps=1, steps=4)


def contenders(engine, prompts, specs=SPECS):
    return [SkvContender(engine, prompts, parse_method(spec)) for spec in specs]


PLAN = Plan((CONTEXT,), (1, 2), 2, 8)


def sweep(path, bench, contenders, plan=PLAN):
    made = []
    with open_records(path, MANIFEST, BenchRecord) as folder:
        run_sweep(bench, contenders, plan, folder, lambda step: made.append(step))
    return read_records(path, BenchRecord)[1], made


def test_a_sweep_measures_everything_once(engine, prompts, tmp_path):
    records, steps = sweep(tmp_path, bench(engine), contenders(engine, prompts))
    assert len(records) == 3 * 2 * 2 == len({r.key for r in records})
    assert all(r.status == "ok" and len(r.step_ms) == 4 and min(r.step_ms) > 0 for r in records)
    assert steps[-1].done == steps[-1].total == 12
    assert [s.done for s in steps] == list(range(13))
    for r in records:
        assert r.kv_device_bytes > 0
        assert (r.kv_host_bytes > 0) == r.method.startswith("shadowkv")
        assert (r.bus_bytes > 0) == r.method.startswith("shadowkv")
        assert r.ttft_s > 0
        assert r.prefill_s == pytest.approx(r.batch * r.ttft_s, rel=0.9)
    again = {r.key[:3]: r.tokens_sha256 for r in records}
    assert all(again[r.key[:3]] == r.tokens_sha256 for r in records), "repeats decode the same tokens"


def test_batches_hold_distinct_rows_cut_to_the_context(engine, prompts):
    rows = torch.cat([prompts.ids(CONTEXT, number) for number in range(4)])
    assert rows.shape == (4, CONTEXT)
    assert len({tuple(row.tolist()) for row in rows}) == 4
    assert torch.equal(prompts.ids(CONTEXT, 2), rows[2:3])


def test_tokens_are_those_of_transformers(engine, prompts, tmp_path):
    mine, theirs = SkvContender(engine, prompts, parse_method("full")), TransformersContender(engine, prompts)
    records, _ = sweep(tmp_path, bench(engine), [mine, theirs])
    by_key = {r.key: r.tokens_sha256 for r in records}
    assert by_key[Cell("full", CONTEXT, 2, 0)] == by_key[Cell("full@hf", CONTEXT, 2, 0)]
    assert engine.model.config._attn_implementation == "skv", "our attention is back"


class Counting(SkvContender):
    """Says in `log` when it builds, and when a batch of it is let go."""

    log: list[tuple[str, str]]

    def start(self, context, batch):
        self.log.append(("built", self.label))
        decoding = super().start(context, batch)
        close = decoding.close

        def closing():
            self.log.append(("let go", self.label))
            close()

        decoding.close = closing
        return decoding


def counting(engine, prompts, specs):
    log, made = [], [Counting(engine, prompts, parse_method(spec)) for spec in specs]
    for contender in made:
        contender.log = log
    return log, made


@pytest.fixture
def growing(monkeypatch):
    """Rows of the tests' short contexts may grow by as much as those of 8K."""
    monkeypatch.setattr("evals.bench.measuring.GROWTH_SHARE", 0.3)


@pytest.mark.usefixtures("growing")
def test_a_batch_is_built_once_and_methods_still_take_turns(engine, prompts, tmp_path):
    log, made = counting(engine, prompts, ["full", "quest:budget=64"])
    records, steps = sweep(tmp_path, bench(engine), made, Plan((CONTEXT,), (1, 2), 4, 8))
    assert [entry for entry in log if entry[0] == "built"] == [("built", c.label) for c in made] * 2
    assert len(log) == 8, "all are let go, and before the next batch"
    assert {label for _, label in log[2:4]} == {c.label for c in made}
    assert [r.method.partition(":")[0] for r in records[:4]] == ["full", "quest", "quest", "full"]
    assert steps[-1].done == steps[-1].total == len(records) == 16
    for r in records:
        assert r.decoded_before == r.repeat * 5, "a warm-up and four steps in each"
        assert r.turns is None
        assert len(r.step_ms) == 4
    for same in ({r.build_s for r in records if r.key[:3] == key} for key in {r.key[:3] for r in records}):
        assert len(same) == 1, "the one build is in every record of it"
    assert {(r.method, r.repeat, r.tokens_sha256) for r in records if r.batch == 1} >= {
        ("full", 0, alone(engine, prompts, 5)), ("full", 3, alone(engine, prompts, 20))
    }  # fmt: skip


def alone(engine, prompts, steps):
    """The tokens of the first prompt, by itself."""
    decoding = SkvContender(engine, prompts, parse_method("full")).start(CONTEXT, 1)
    for _ in range(steps):
        decoding.step()
    return decoding.tokens_sha256()


def test_a_build_serves_no_repeat_in_which_rows_would_have_grown_too_long(engine, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("evals.bench.measuring.GROWTH_SHARE", 18 / CONTEXT)
    log, made = counting(engine, prompts, ["shadowkv:rank=8,budget=64,engine=fast"])
    assert bench(engine).repeats_of_a_build(CONTEXT) == 2
    records, _ = sweep(tmp_path, bench(engine), made, Plan((CONTEXT,), (1,), 5, 8))
    assert [r.decoded_before for r in records] == [0, 13, 0, 13, 0], "eight more steps count hits"
    assert log == [("built", made[0].label), ("let go", made[0].label)] * 3
    monkeypatch.undo()
    assert bench(engine).repeats_of_a_build(CONTEXT) == 1
    assert bench(engine).steps_of_a_build(10**6) == 128, "beyond it buffers grow, in the middle of what is timed"


@pytest.mark.usefixtures("growing")
def test_methods_that_do_not_fit_side_by_side_are_measured_apart(engine, prompts, tmp_path):
    specs = ["full", "quest:budget=64", "streaming:budget=16"]
    methods = [parse_method(spec) for spec in specs]
    plain = room(engine)
    of = {m.label: plain.need(m, CONTEXT, 2, 5).device for m in methods}
    cap = int((of[specs[0]] + of[specs[2]] - plain.model.weight_bytes) / 0.95) + 1
    assert plain.model.weight_bytes + sum(x - plain.model.weight_bytes for x in of.values()) > cap
    log, made = counting(engine, prompts, specs)
    records, _ = sweep(tmp_path, bench(engine, cap_bytes=cap), made, Plan((CONTEXT,), (2,), 2, 8))
    assert [r.method for r in records] == [specs[0], specs[2], specs[2], specs[0], specs[1], specs[1]]
    assert {tuple(r.turns) for r in records if r.method != specs[1]} == {(specs[0], specs[2])}
    assert {tuple(r.turns) for r in records if r.method == specs[1]} == {(specs[1],)}
    assert sum(kind == "built" for kind, _ in log) == 3
    rows = summarise_bench(records)
    said = [note for note in notes_of(MANIFEST, records, rows) if "not turn by turn with full" in note]
    assert len(said) == 1
    assert specs[1] in said[0]
    assert specs[2] not in said[0]
    assert any("up to 5 tokens more than their context (1.7 %)" in n for n in notes_of(MANIFEST, records, rows))


@pytest.mark.usefixtures("growing")
def test_memory_that_others_hold_is_no_failure_of_a_method(engine, prompts, tmp_path):
    """Where the plan was wrong, the others make way, and come back by being built anew."""
    log, (full, quest) = counting(engine, prompts, ["full", "quest:budget=64"])
    there, start = [], quest.start

    def crowded(context, batch):
        there.append(sum({"built": 1, "let go": -1}[kind] for kind, _ in log))
        if there[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return start(context, batch)

    quest.start = crowded
    records, _ = sweep(tmp_path, bench(engine), [full, quest], Plan((CONTEXT,), (1,), 2, 8))
    assert [r.status for r in records] == ["ok"] * 4
    assert there == [1, 0]
    first = [("built", full.label), ("let go", full.label), ("built", quest.label)]
    assert log == [*first, ("built", full.label), ("let go", quest.label), ("let go", full.label)]


@pytest.mark.usefixtures("growing")
def test_peaks_are_without_what_stands_beside(engine, prompts, monkeypatch):
    monkeypatch.setattr("evals.bench.measuring.peak_bytes", lambda _: (None, 10**9))
    mine, other = contenders(engine, prompts, ["full", "quest:budget=64"])
    cells = [Cell(c.label, CONTEXT, 1, repeat) for repeat in (0, 1) for c in (mine, other)]
    there = bench(engine)
    with there.batches() as batches:
        first, beside, again, _ = (
            there.measure(c, cell, batches) for c, cell in zip([mine, other] * 2, cells, strict=True)
        )
    assert first.peak_host_bytes == 10**9
    assert beside.peak_host_bytes == 10**9 - first.kv_device_bytes
    assert again.peak_host_bytes == 10**9, "building is in it, which was done once"


@pytest.mark.usefixtures("growing")
def test_hits_stay_those_that_are_made_in_later_repeats(engine):
    made_up = SyntheticPrompts(engine, 0, with_queries=True)
    contender = SkvContender(engine, made_up, parse_method("shadowkv:rank=8,budget=64,outliers=2,engine=fast"))
    there = replace(bench(engine), hits=0.5)
    with there.batches() as batches:
        first, second = (there.measure(contender, Cell(contender.label, 600, 1, r), batches) for r in (0, 1))
        made = batches.built[contender.label].made
    assert second.decoded_before > 0
    assert first.hit_rate == second.hit_rate, "counted once"
    assert [int(known.max()) for known in made._known] == [600 // 8 - 5] * len(made._known), "as no hits were made yet"


@pytest.mark.usefixtures("growing")
def test_transformers_waits_its_turn_without_its_attention(engine, prompts, tmp_path):
    mine, theirs = SkvContender(engine, prompts, parse_method("full")), TransformersContender(engine, prompts)
    records, _ = sweep(tmp_path, bench(engine), [mine, theirs], Plan((CONTEXT,), (1,), 3, 8))
    shas = {(r.method, r.repeat): r.tokens_sha256 for r in records if r.status == "ok"}
    assert len(shas) == 6
    assert all(shas["full", repeat] == shas["full@hf", repeat] for repeat in range(3))
    assert engine.model.config._attn_implementation == "skv"


def test_methods_take_turns_within_a_repeat():
    cells = list(ladder_cells(["a", "b", "c"], 10, (1, 2), 3))
    assert [c.method for c in cells[:9]] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [c.repeat for c in cells[:9]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(a.batch <= b.batch for a, b in pairwise(cells))
    assert len(set(cells)) == len(cells) == 18


def test_a_cap_stops_a_method_and_the_others_go_on(engine, prompts, tmp_path):
    plain = room(engine)
    cap = plain.need(parse_method("full"), CONTEXT, 1, 5).device + 1
    slim = "streaming:budget=16"
    assert plain.need(parse_method(slim), CONTEXT, 2, 5).device < plain.need(parse_method("full"), CONTEXT, 2, 5).device
    cap = max(cap, plain.need(parse_method(slim), CONTEXT, 2, 5).device + 1)
    records, steps = sweep(tmp_path, bench(engine, cap_bytes=cap), contenders(engine, prompts, ["full", slim]))
    found = {r.key: r for r in records}
    assert found["full", CONTEXT, 1, 0].status == found["full", CONTEXT, 1, 1].status == "ok"
    assert found["full", CONTEXT, 2, 0].status == "oom"
    assert "as planned, the cap is" in found["full", CONTEXT, 2, 0].error
    assert ("full", CONTEXT, 2, 1) not in found, "not tried again"
    assert found[slim, CONTEXT, 2, 1].status == "ok"
    assert steps[-1].done == steps[-1].total


class Hungry(SkvContender):
    """Its allocator gives out at batch 2, in the middle of decoding."""

    def start(self, context, batch):
        decoding = super().start(context, batch)
        if batch >= 2:
            held = torch.zeros(2**20)

            def step():
                assert held is not None
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

            decoding.step = step
        return decoding


class Watching(SkvContender):
    """Looks, before it takes memory of its own, for what Hungry held."""

    def start(self, context, batch):
        assert not [x for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() == 2**20]
        return super().start(context, batch)


def test_an_allocator_that_gives_out_is_recorded_and_let_go(engine, prompts, tmp_path):
    hungry = Hungry(engine, prompts, parse_method("quest:budget=64"))
    watching = Watching(engine, prompts, parse_method("full"))
    records, _ = sweep(tmp_path, bench(engine), [hungry, watching], Plan((CONTEXT, 400), (1, 2, 4), 1, 8))
    status = {r.key[:3]: r.status for r in records}
    for context in (CONTEXT, 400):
        assert [status.get((hungry.label, context, b)) for b in (1, 2, 4)] == ["ok", "oom", None]
        assert [status["full", context, b] for b in (1, 2, 4)] == ["ok"] * 3


def test_other_failures_are_errors_and_tried_again(engine, prompts, tmp_path):
    class Broken(SkvContender):
        def start(self, context, batch):
            raise RuntimeError("a kernel that does not exist")

    broken = Broken(engine, prompts, parse_method("full"))
    records, _ = sweep(tmp_path, bench(engine), [broken, *contenders(engine, prompts, ["quest:budget=64"])])
    assert [r.status for r in records if r.method == "full"] == ["error"]
    assert sum(r.method != "full" for r in records) == 4
    records, _ = sweep(tmp_path, bench(engine), contenders(engine, prompts, ["full"]))
    assert [r.status for r in records if r.method == "full"] == ["ok"] * 4


def test_a_bug_is_not_swallowed(engine, prompts, tmp_path):
    class Buggy(SkvContender):
        def start(self, context, batch):
            raise KeyError("ours")

    with pytest.raises(KeyError):
        sweep(tmp_path, bench(engine), [Buggy(engine, prompts, parse_method("full"))])


def test_an_interrupted_sweep_goes_on_where_it_was(engine, prompts, tmp_path):
    """Kill after five records and in the middle of writing one; what was finished is not run again."""

    class KilledError(Exception):
        pass

    def kill(step):
        if step.done == 5:
            raise KilledError

    plan = Plan((CONTEXT,), (1, 2), 2, 8)
    with pytest.raises(KilledError), open_records(tmp_path, MANIFEST, BenchRecord) as folder:
        run_sweep(bench(engine), contenders(engine, prompts), plan, folder, kill)
    file = tmp_path / "throughput.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + before.splitlines()[0][:100])
    records, _ = sweep(tmp_path, bench(engine), contenders(engine, prompts), plan)
    assert len(records) == 12
    assert file.read_bytes().startswith(before)
    assert len(file.read_bytes().splitlines()) == 12


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 24, 31, 32])
@pytest.mark.parametrize("guess", [0, 1, 3, 24, 30, 40])
def test_the_largest_batch_is_found_from_any_guess(limit, guess):
    asked = []

    def fits(batch):
        asked.append(batch)
        assert 1 <= batch <= 32
        return batch <= limit

    assert largest_fitting(fits, guess, 32) == limit
    assert len(set(asked)) == len(asked), "nothing is measured twice"
    assert len(asked) <= 11
    if guess == limit and 1 <= limit < 32:
        assert len(asked) == 2


def test_a_search_measures_each_largest_batch_and_fulls(engine, prompts, tmp_path):
    plain, slim = room(engine), parse_method("snapkv:budget=64")
    cap = plain.need(parse_method("full"), CONTEXT, 3, 5).device + 1
    capped = bench(engine, cap_bytes=cap)
    most = max(b for b in range(1, 9) if plain.need(slim, CONTEXT, b, 5).device <= cap)
    assert most > 3
    plan = Plan((CONTEXT,), None, 2, 8, find_max=True)
    records, _ = sweep(tmp_path, capped, contenders(engine, prompts, ["full", slim.label]), plan)
    ok = {(r.method, r.batch, r.repeat) for r in records if r.status == "ok"}
    assert {("full", 3, 0), ("full", 3, 1), (slim.label, 3, 1), (slim.label, most, 0), (slim.label, most, 1)} <= ok
    assert ("full", 4) in {(r.method, r.batch) for r in records if r.status == "oom"}
    best = {gain.method: gain for gain in gains(records)}
    assert best["full"].full_batch in (2, 3)


def test_what_is_planned_is_what_is_held(engine, prompts):
    for spec in SPECS:
        method = parse_method(spec)
        decoding = SkvContender(engine, prompts, method).start(CONTEXT, 3)
        held, there = decoding.nbytes(), room(engine, computes_prompts=False)
        planned = there.need(method, CONTEXT, 3, 0)
        assert held.device <= planned.device - there.model.weight_bytes
        assert held.host == pytest.approx(planned.host, rel=0.01)
        decoding.close()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_room_is_planned_as_skv_plan_does(kind):
    """Sliding windows, a step's workspace and logits count, as they do before anyone rents a GPU."""
    size, method = model_size(tiny_model(kind).config, 4), parse_method("quest:budget=64,dense_layers=0")
    there = Room(torch.device("cpu"), size, computes_prompts=False)
    none, one = (there.need(method, 700, batch, 0).device for batch in (0, 1))
    planned = sum(part.device for part in sequence_parts(demand_of(method, size.dims, 700), size, 700).values())
    assert none == size.weight_bytes
    assert one - none == planned + 256 * size.dims.full_bytes_per_token


def test_bytes_read_are_those_of_the_plan(engine, prompts):
    """So that GB/s of a sweep and of `skv plan` are of the same bytes, landmarks and page extremes among them."""
    found = [bench(engine).measure(c, Cell(c.label, CONTEXT, 2, 0)) for c in contenders(engine, prompts)]
    size = model_size(engine.model.config, 4, device="cpu")
    for made, spec in zip(found, SPECS, strict=True):
        method = parse_method(spec)
        assert made.read_bytes == size.step_parameters * 4 + 2 * method.read_bytes(size.dims, CONTEXT)
        assert made.bus_bytes == 2 * method.bus_bytes(size.dims, CONTEXT)


def test_short_host_memory_is_said_with_the_number(engine, monkeypatch):
    monkeypatch.setattr("evals.bench.memory.available_host_bytes", lambda: 2**20)
    with pytest.raises(MemoryShortError, match=r"needs 2\.\d\d GiB of host memory, 1\.0 MiB are available"):
        room(engine).check_host(parse_method("full"), 2**20, 2, 5)
    room(engine).check_host(parse_method("full"), 20, 1, 5)


@pytest.mark.parametrize(("device", "number"), [("cuda", 3), ("cuda:1", 1)])
def test_a_gpu_is_held_to_the_cap_by_its_number(engine, monkeypatch, device, number):
    """`--device cuda` names no number, and torch's function for this takes nothing else."""
    held = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * 2**30, 100 * 2**30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda share, index: held.update({index: share}), raising=False
    )
    room(engine, device=torch.device(device), cap_bytes=25 * 2**30).hold_cap()
    assert held == {number: 0.25}


def test_host_memory_that_grows_on_demand_can_be_told(monkeypatch, tmp_path):
    """Some virtual machines begin with little memory and are given more as they take it."""
    (tmp_path / "meminfo").write_text("MemTotal: 2097152 kB\nMemFree: 1 kB\nMemAvailable: 1048576 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    with pytest.raises(SkvError, match=r"keep 3\.0 GiB on the host, where 1\.0 of 2\.0 GiB are free"):
        host_memory.require_host_bytes(3 * 2**30, "it")
    monkeypatch.setenv("SKV_HOST_MEMORY", "128GiB")
    assert available_host_bytes() == 127 * 2**30, "what is taken now stays taken"
    host_memory.require_host_bytes(3 * 2**30, "it")
    monkeypatch.setenv("SKV_HOST_MEMORY", "much")
    with pytest.raises(SkvError, match="SKV_HOST_MEMORY: 'much' is not a size"):
        available_host_bytes()


def test_host_memory_of_this_machine_is_read():
    import os

    assert 2**20 < available_host_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("name", methods())
def test_made_up_keys_cost_what_real_ones_do(engine, prompts, tokenizer, name):
    method = at_its_bound(methods()[name]()).on_calibration(None)
    if method.params().get("budget"):
        method = replace(method, budget=64)
    if name == "kivi":
        method = replace(method, group=16)
    if name == "shadowkv":
        method = replace(method, rank=8)
    if name == "xkv":
        method = replace(method, rank_k=32, rank_v=32)
    assert method.cost_follows_text == (name == "infinigen")
    made_up = SyntheticPrompts(engine, 0, with_queries=True)
    real, filled = (SkvContender(engine, source, method).start(CONTEXT, 2) for source in (prompts, made_up))
    assert real.nbytes() == filled.nbytes()
    filled.step()
    assert filled.began.prefill_s is None
    shas = {SkvContender(engine, made_up, method).start(CONTEXT, 2).tokens_sha256() for _ in range(2)}
    assert len(shas) == 1, "the same rows every time"
    assert all(layer.layer_kv(None, 0).made_up for layer in next(made_up.rows(CONTEXT, 1, None)).recorded)


def test_made_up_keys_have_the_size_of_real_ones(engine, prompts):
    rows = SyntheticPrompts(engine, 0, with_queries=True)
    first, second = rows.rows(CONTEXT, 2, None)
    layers = [x.layer_kv(None, 0).k for x in (*first.recorded, *second.recorded)]
    assert len({float(k[0, 0, 0, 0]) for k in layers}) == len(layers), "no row or layer is another's copy"
    real = next(prompts.rows(CONTEXT, 1, None)).recorded
    for a, b in zip(second.recorded, real, strict=True):
        x, y = a.layer_kv(None, 0), b.layer_kv(None, 0)
        assert [t.shape for t in (x.k, x.v, x.q_tail, x.q_all)] == [t.shape for t in (y.k, y.v, y.q_tail, y.q_all)]
        for mine, theirs in ((x.k, y.k), (x.v, y.v), (x.q_all, y.q_all)):
            assert mine.std() == pytest.approx(theirs.std().item(), rel=0.3)
    with pytest.raises(SkvError, match="minference is a way to compute a prompt"):
        next(SyntheticPrompts(engine, 0, with_queries=True).rows(CONTEXT, 1, parse_method("full+minference").prefill))


def test_transformers_takes_made_up_keys_too(engine):
    made_up = SyntheticPrompts(engine, 0, with_queries=False)
    theirs = TransformersContender(engine, made_up).start(CONTEXT, 2)
    ours = SkvContender(engine, made_up, parse_method("full")).start(CONTEXT, 2)
    with theirs.awake():
        for _ in range(5):
            theirs.step()
    theirs.close()
    for _ in range(5):
        ours.step()
    assert ours.tokens_sha256() == theirs.tokens_sha256()


def test_prompts_are_computed_once_and_forgotten_with_their_context(engine, prompts, monkeypatch):
    computed = []
    real = engine.stream
    monkeypatch.setattr(engine, "stream", lambda ids, sparse=None: computed.append(len(ids)) or real(ids, sparse))
    for spec in SPECS:
        SkvContender(engine, prompts, parse_method(spec)).start(CONTEXT, 3).close()
    assert computed == [1, 1, 1]
    next(prompts.rows(400, 1, None))
    assert {key[0] for key in prompts._kept} == {400}


def test_prompts_that_the_host_cannot_keep_go_straight_into_caches(engine, prompts, monkeypatch):
    specs = [*SPECS, "full+minference:vertical=8,slash=8"]
    kept = [SkvContender(engine, prompts, parse_method(spec)).start(CONTEXT, 3) for spec in specs]
    assert not torch.equal(kept[0]._tokens[0], kept[-1]._tokens[0]), "a sparse prompt is another one"
    prompts._kept.clear()
    monkeypatch.setattr("evals.bench.prompts.available_host_bytes", lambda: 0)
    for before, spec in zip(kept, specs, strict=True):
        straight = SkvContender(engine, prompts, parse_method(spec)).start(CONTEXT, 3)
        assert not prompts._kept
        assert (before.began.streamed_rows, straight.began.streamed_rows) == (0, 3)
        assert straight.began.ttft_s > 0
        assert straight.began.prefill_s == pytest.approx(3 * straight.began.ttft_s, rel=0.9)
        for decoding in (before, straight):
            for _ in range(5):
                decoding.step()
        assert straight.tokens_sha256() == before.tokens_sha256()
        assert straight.nbytes() == before.nbytes()
    one = engine.snapshot_bytes(CONTEXT)
    monkeypatch.setattr("evals.bench.prompts.available_host_bytes", lambda: 4 * one)
    mixed = SkvContender(engine, prompts, parse_method("full")).start(CONTEXT, 3).began
    (first,) = prompts._kept.values()
    assert (mixed.streamed_rows, mixed.ttft_s) == (2, first.prefill_s), "of what was computed alone"
    assert mixed.prefill_s > first.prefill_s
    notes = notes_of(MANIFEST, [replace(record("full", 2, 0, 1.0), streamed_rows=2)], [])
    assert any("straight into caches" in note and "1k x 2" in note for note in notes)


def test_hits_are_chunks_that_were_chosen_before(engine, prompts):
    decoding = SkvContender(engine, prompts, parse_method("shadowkv:rank=8,budget=64,engine=fast")).start(CONTEXT, 2)
    chosen = []

    def step():
        decoding.step()
        chosen.append([{(row, head, int(n)) for (row, head, _), n in np.ndenumerate(held)} for held in resident()])

    def resident():
        return [held.numpy() for held in decoding.resident_chunks()]

    step()
    found = hit_rate(step, decoding.resident_chunks, 6)
    same = sum(len(now & was) for a, b in pairwise(chosen) for was, now in zip(a, b, strict=True))
    assert found == same / sum(len(layer) for step in chosen[1:] for layer in step)
    assert 0 < found < 1
    assert hit_rate(lambda: pytest.fail("nothing to count"), lambda: [], 6) is None


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_hits_can_be_made(engine, share):
    """Of random keys a step finds what chance left; a plan assumes a share, and its speed has to be measured so."""
    method = parse_method("shadowkv:rank=8,budget=64,outliers=2,engine=fast")
    decoding = SkvContender(engine, SyntheticPrompts(engine, 0, with_queries=True), method).start(2000, 2)
    made = MadeHits(share, decoding.resident_chunks, decoding.chunk_numbers)
    known = [numbers.clone() for numbers in decoding.chunk_numbers()]

    def step():
        made()
        decoding.step()

    step()
    assert hit_rate(step, decoding.resident_chunks, 8) == pytest.approx(share, abs=0.06 if share == 0.6 else 0.01)
    for numbers, real in zip(decoding.chunk_numbers(), known, strict=True):
        assert set(numbers.unique().tolist()) <= set(real.unique().tolist())


def test_what_is_made_before_a_step_is_not_of_its_time(engine):
    now = [0.0]
    clock = SimpleNamespace(now=lambda: now[0])
    made, steps = (lambda: now.__setitem__(0, now[0] + 7)), (lambda: now.__setitem__(0, now[0] + 0.5))
    assert step_times(steps, 3, 4, clock, made) == [500.0] * 4


def test_a_measurement_makes_the_hits_that_it_is_told_to(engine):
    there = replace(bench(engine), hits=1.0)
    prompts = SyntheticPrompts(engine, 0, with_queries=True)
    for spec, rate in (("shadowkv:rank=8,budget=64,outliers=2,engine=fast", 1.0), ("full", None)):
        contender = SkvContender(engine, prompts, parse_method(spec))
        record = there.measure(contender, Cell(contender.label, 600, 1, 0))
        assert (record.status, record.error) == ("ok", None)
        assert record.hit_rate == rate


def test_empty_slots_are_no_hits():
    held = torch.tensor([[[3, 4, -1]]])
    found = hit_rate(lambda: held.copy_(torch.tensor([[[3, 5, -1]]])), lambda: [held], 1)
    assert found == 0.5


def test_a_sweep_shows_hits_where_chunks_stay(engine, prompts, tmp_path):
    specs = ["full", "shadowkv:rank=8,budget=64", "shadowkv:rank=8,budget=64,engine=fast"]
    plan = Plan((CONTEXT,), (1,), 1, 8)
    records, _ = sweep(tmp_path / "fast", bench(engine), contenders(engine, prompts, specs), plan)
    assert [r.hit_rate is not None for r in records] == [False, False, True]
    heads = [throughput_table("t", summarise_bench(found)).columns for found in (records, records[:2])]
    assert ["hits\n%" in columns for columns in heads] == [True, False]
    notes = notes_of(MANIFEST, records, summarise_bench(records))
    assert any("say nothing of the kernels: shadowkv:budget=64,engine=fast,rank=8" in note for note in notes)
    decoded = {r.tokens_sha256 for r in records[1:]}
    assert len(decoded) == 1, "steps that only count are not among those compared"


def test_room_is_left_for_a_prompt_and_the_queries_that_are_kept_of_it(engine):
    dims, hidden = engine.dims, engine.model.config.hidden_size
    asked = {"computes_prompts": False}, {}, {"records_queries": True}
    without, dense, queries = (
        room(engine, **changes).need(parse_method("full"), CONTEXT, 1, 5).device for changes in asked
    )
    of_a_layer = dims.full_bytes_per_token // dims.layers
    assert dense - without == 2 * CONTEXT * (of_a_layer + hidden * dims.element_bytes)
    assert queries - dense == 2 * CONTEXT * dims.query_bytes_per_token // dims.layers


def test_kept_prompts_make_way_for_what_is_measured(engine, prompts, monkeypatch):
    """The host of a method that offloads its values must not be full of prompts."""
    one, total = engine.snapshot_bytes(CONTEXT), 20 * engine.snapshot_bytes(CONTEXT)

    def free():
        return total - one * len(prompts._kept)

    monkeypatch.setattr("evals.bench.prompts.available_host_bytes", free)
    monkeypatch.setattr("evals.bench.memory.available_host_bytes", free)
    method, held = parse_method("shadowkv:rank=8,budget=64"), []
    for batch in (8, 1):
        need = room(engine).host_need(method, CONTEXT, batch, 5)
        bench(engine).check_room(SkvContender(engine, prompts, method), CONTEXT, batch, 5)
        prompts.prepare(CONTEXT, 8, None)
        held.append(len(prompts._kept))
        assert held[-1] == max(0, int((total - need) / one / 4))
    assert 0 < held[0] < held[1] < 8
    prompts.leave_host(total)
    assert not prompts._kept


def test_short_prompts_are_computed_together(engine, prompts, monkeypatch):
    monkeypatch.setattr("evals.bench.prompts.available_host_bytes", lambda: 0)
    assert [len(list(prompts.ids(60, number))) for number in range(5)] == [1] * 5
    computed = []
    real = engine.stream
    monkeypatch.setattr(engine, "stream", lambda ids, sparse=None: computed.append(len(ids)) or real(ids, sparse))
    contender = SkvContender(engine, prompts, parse_method("full"))
    contender._clock = SimpleNamespace(now=count().__next__)
    decoding = contender.start(60, 5)
    assert computed == [2, 2, 1], "the prefill's chunks hold 128 tokens"
    assert decoding.began == Began(ttft_s=1, prefill_s=3, build_s=1, stacked=decoding.began.stacked, streamed_rows=5)
    for _ in range(3):
        decoding.step()
    monkeypatch.undo()
    alone = SkvContender(engine, prompts, parse_method("full")).start(60, 5)
    for _ in range(3):
        alone.step()
    assert decoding.tokens_sha256() == alone.tokens_sha256()


@pytest.mark.parametrize("coding", ["native", "int8"])
def test_values_of_a_batch_are_written_once(engine, prompts, monkeypatch, coding):
    """Rows are built where they will be: joining them copies none of what is on the host."""
    method, places = parse_method(f"shadowkv:rank=12,budget=64,outliers=2,engine=fast,values={coding}"), []
    monkeypatch.setattr("evals.bench.engines.HostRows", lambda rows: places.append(HostRows(rows)) or places[-1])
    decoding = SkvContender(engine, prompts, method).start(CONTEXT, 3)
    [share] = decoding._cache._shares
    layers = [layer._values for layer in share.cache.layers.values()]
    blocks = {block.untyped_storage().data_ptr() for block in places[0]._blocks.values()}
    assert {part.data.untyped_storage().data_ptr() for parts in layers for part in parts} == blocks
    assert len(blocks) == len(layers) * len(layers[0])
    for _ in range(4):
        decoding.step()
    monkeypatch.setattr("evals.bench.engines.HostRows", lambda rows: None)
    apart = SkvContender(engine, prompts, method).start(CONTEXT, 3)
    for _ in range(4):
        apart.step()
    assert decoding.tokens_sha256() == apart.tokens_sha256()
    assert decoding.nbytes() == apart.nbytes()


def test_distributions():
    assert distribution([]) is None
    assert distribution([1.0] * 9 + [101.0]) == pytest.approx((1.0, 1.0, 11.0))
    assert spread([]) is None
    found = spread([2.0, 4.0, 10.0])
    assert (found.median, found.low, found.high, found.relative) == (4.0, 2.0, 10.0, 1.0)
    ratios = paired_ratios({0: 2.0, 1: 9.0, 2: 5.0}, {0: 1.0, 1: 3.0, 7: 1.0})
    assert (ratios.low, ratios.median, ratios.high) == (2.0, 2.5, 3.0)
    assert paired_ratios({0: 1.0}, {}) is None


def test_step_times_leave_the_warm_up_out():
    now, called = [0.0], []

    def step():
        called.append(1)
        now[0] += 10.0 if len(called) <= 3 else 0.5

    assert step_times(step, 3, 4, SimpleNamespace(now=lambda: now[0])) == [500.0] * 4
    assert len(called) == 7


def record(method, batch, repeat, ms, **changes):
    made = BenchRecord(method, 1024, batch, repeat, "ok", None, "here", "now", step_ms=[ms] * 5, ttft_s=1.0)
    return replace(made, **changes)


def test_rows_compare_at_equal_batch_and_at_the_best_one():
    records = [
        *(record("full", 1, repeat, 10.0) for repeat in (0, 1)),
        *(record("full", 2, repeat, 40.0) for repeat in (0, 1)),
        record("full", 4, 0, 0.0, status="oom", error="no", step_ms=[]),
        *(record("fast", 1, repeat, ms) for repeat, ms in ((0, 20.0), (1, 16.0))),
        *(record("fast", 4, repeat, ms) for repeat, ms in ((0, 20.0), (1, 10.0))),
    ]
    rows = {(row.method, row.batch): row for row in summarise_bench(records)}
    assert rows["full", 1].tokens_per_s == 100
    assert rows["full", 4].status == "oom"
    assert rows["full", 4].tokens_per_s is None
    assert (rows["fast", 1].ratio_low, rows["fast", 1].ratio_high) == (0.5, 0.625)
    assert rows["fast", 4].ratio is None, "full attention has no time at that batch"
    best = {gain.method: gain for gain in gains(records)}
    assert (best["full"].batch, best["fast"].batch) == (1, 4)
    assert (best["fast"].gain.low, best["fast"].gain.high) == (2.0, 4.0)
    assert best["fast"].gain_equal.median == pytest.approx(0.5625)


def test_times_of_two_machines_make_no_ratio():
    records = [
        *(record("full", 1, repeat, 10.0) for repeat in (0, 1, 2)),
        record("fast", 1, 0, 5.0),
        *(record("fast", 1, repeat, 1.0, machine="elsewhere") for repeat in (1, 2)),
        record("other", 1, 0, 1.0, machine="elsewhere"),
    ]
    rows = {row.method: row for row in summarise_bench(records)}
    assert (rows["fast"].ratio_low, rows["fast"].ratio_high) == (2.0, 2.0)
    assert rows["other"].ratio is None
    assert {gain.method: gain.gain and gain.gain.high for gain in gains(records)} == {
        "full": 1.0, "fast": 2.0, "other": None,
    }  # fmt: skip


def test_what_failed_among_repeats_is_told():
    """A row that has some times is not one that has them all."""
    records = [
        record("full", 1, 0, 10.0),
        record("full", 1, 1, 0.0, status="oom", error="no room", step_ms=[]),
    ]
    rows = summarise_bench(records)
    assert (rows[0].status, rows[0].repeats, rows[0].failed) == ("ok", 1, 1)
    assert "oom: full @ 1k x 1, in 1 of 2 repeats: no room" in notes_of(MANIFEST, records, rows)


def test_ratios_of_different_commands_are_told():
    sessions = [replace(MANIFEST.sessions[0], started=f"2026-01-0{day}T00:00:00+00:00") for day in (1, 2)]
    told = replace(MANIFEST, sessions=sessions)
    first, second = "2026-01-01T08:00:00+00:00", "2026-01-02T08:00:00+00:00"
    records = [
        record("full", 1, 0, 10.0, started=first),
        record("beside", 1, 0, 10.0, started=first),
        record("later", 1, 0, 10.0, started=second),
        record("alone", 2, 0, 10.0, started=second),
    ]
    said = [note for note in notes_of(told, records, summarise_bench(records)) if "another command" in note]
    assert said == ["not measured side by side, full attention being of another command in part: later, alone"]


def test_reports_say_what_was_not_real(engine, prompts, tmp_path):
    sweep(tmp_path, bench(engine), contenders(engine, prompts, ["full", "duo:sinks=4,recent=24"]))
    path = tmp_path / "run.json"
    told = json.loads(path.read_text())
    told["config"]["synthetic_kv"] = told["model"]["dummy"] = True
    told["notes"] = ["synthetic KV: made up"]
    path.write_text(json.dumps(told))
    with (tmp_path / "throughput.jsonl").open("a") as file:
        elsewhere = record("quest", 1, 0, 5.0, machine="elsewhere", context=CONTEXT)
        file.write(json.dumps(vars(elsewhere)) + "\n")
    section, files = write_run(tmp_path)
    assert {p.name for p in files} == {
        "summary.csv", "summary.md", "summary.tex", "throughput.png", "gain.png", "memory.png",
    }  # fmt: skip
    for name in ("summary.csv", "summary.md", "summary.tex"):
        said = (tmp_path / name).read_text()
        assert "synthetic KV: made up" in said
        assert "rows run one after the other: duo" in said
        assert "here; elsewhere" in said
    assert "[dummy weights] [synthetic KV]" in section.tables[0].title
    assert "[dummy weights] [synthetic KV]" in (tmp_path / "summary.tex").read_text().replace("\\_", "_")


def test_latex_compiles_whatever_a_model_is_called():
    made = latex(
        Table("throughput · my_model 50% #1", ["a_b", "tokens/s"], [["x_y ±3%", "1"]]), ["not\n\nwhole"], ["two\nlines"]
    )
    assert r"\caption{throughput $\cdot$ my\_model 50\% \#1. not whole}" in made
    assert r"x\_y $\pm$3\%" in made
    assert made.endswith("% two lines\n")


SMI = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log><attached_gpus>1</attached_gpus><gpu id="00000000:04:00.0">
<temperature><gpu_temp>35 C</gpu_temp></temperature>
<gpu_power_readings><power_draw>N/A</power_draw><average_power_draw>80.10 W</average_power_draw></gpu_power_readings>
<clocks><graphics_clock>1980 MHz</graphics_clock><sm_clock>1980 MHz</sm_clock><mem_clock>2619 MHz</mem_clock></clocks>
<processes>PROCESSES</processes>
</gpu></nvidia_smi_log>"""


def process(kind):
    return f"<process_info><pid>4001</pid><type>{kind}</type><used_memory>90 MiB</used_memory></process_info>"


@pytest.fixture
def smi(monkeypatch):
    """nvidia-smi, how often it was asked and what it says."""
    there = SimpleNamespace(asked=[], says=SMI, fails=None)

    def run(command, **_):
        there.asked.append(command)
        if there.fails is not None:
            raise there.fails
        return SimpleNamespace(returncode=0, stdout=there.says)

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid="c0ffee"))
    return there


@pytest.mark.parametrize(
    ("processes", "others"), [(["C", "C", "G"], 1), (["C"], 0), (["C+G", "C", "C"], 2), ([], 0), (["G"], 0)]
)
def test_the_gpu_is_asked_once_by_its_own_name(smi, processes, others):
    """As CUDA_VISIBLE_DEVICES may number it anew, and from within a container, which sees other process ids."""
    smi.says = SMI.replace("PROCESSES", "".join(map(process, processes)))
    found = conditions(torch.device("cuda:0"))
    [command] = smi.asked
    assert command[-1] == "GPU-c0ffee"
    del found["load_per_core"]
    clocks = {"clocks.sm": "1980", "clocks.mem": "2619", "temperature.gpu": "35", "power.draw": "80.10"}
    assert found == clocks | {"other_gpu_processes": others}


@pytest.mark.parametrize(
    ("says", "fails"),
    [
        ("Failed to initialize NVML", None),
        ("<nvidia_smi_log></nvidia_smi_log>", None),
        ("<nvidia_smi_log><gpu><clocks><sm_clock>N/A</sm_clock></clocks></gpu></nvidia_smi_log>", None),
        ("", FileNotFoundError("nvidia-smi")),
        ("", subprocess.CalledProcessError(9, "nvidia-smi")),
        ("", subprocess.TimeoutExpired("nvidia-smi", 10)),
    ],
)
def test_a_gpu_that_does_not_tell_is_no_matter(smi, says, fails):
    smi.says, smi.fails = says, fails
    assert set(conditions(torch.device("cuda:0"))) == {"load_per_core"}
    assert len(smi.asked) == 1


def test_noise_is_told():
    before = [{"load_per_core": 0.1, "clocks.sm": "1980", "other_gpu_processes": 0}, {"load_per_core": 0.9}]
    assert (
        noise_note(before)
        == "load per core 0.10 to 0.90, SM clock 1980 to 1980 MHz, up to 0 other processes on the GPU"
    )
    assert noise_note([]) == "load not readable"


@pytest.mark.parametrize("text", ["0", "1,0", "2,1", "1,1", "x", "", "1;2", "-1"])
def test_nonsense_is_no_list_of_batches(text):
    with pytest.raises(SkvError):
        parse_batches(text)


def test_batches():
    assert parse_batches("1, 2,4") == (1, 2, 4)
    assert parse_batches("auto") is None
    assert doublings(8) == (1, 2, 4, 8)
    assert doublings(11) == (1, 2, 4, 8)


@pytest.mark.parametrize(
    "spec", ["full", "shadowkv:rank=8,budget=64", "quest:budget=64", "loki:basis=prompt,budget=32", "kivi:group=16"]
)
def test_latency_finds_the_parts_of_a_step(engine, prompts, tmp_path, spec):
    contender = SkvContender(engine, prompts, parse_method(spec))
    found = measure_latency(bench(engine), contender, Cell(contender.label, CONTEXT, 2, 0), tmp_path / "trace.json")
    assert found.status == "ok", found.error
    assert set(found.parts_ms) == set(PARTS)
    assert sum(found.parts_ms.values()) == pytest.approx(found.profiled_ms, rel=0.01)
    name = spec.partition(":")[0]
    always = {"attention", "projections", "mlp", "head", "sampling", "other"}
    more = {"shadowkv": {"selection", "fetch", "rebuild"}, "quest": {"selection", "fetch"}, "kivi": {"rebuild"}}
    more["loki"] = {"selection", "fetch"}
    assert {part for part, ms in found.parts_ms.items() if ms > 0} == always | more.get(name, set())
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"skv::step", "skv::attention", "skv::mlp"} <= names
    assert not engine.model.get_output_embeddings()._forward_hooks, "hooks are gone"
    with open_records(tmp_path / "run", replace(MANIFEST, benchmark="latency"), LatencyRecord) as folder:
        folder.append(found)
    assert any(file.name == "latency.png" for file in write_run(tmp_path / "run")[1])


def event(name, cpu, kernels, *children):
    own = [SimpleNamespace(name="a_kernel", duration=us) for us in kernels]
    return SimpleNamespace(name=name, cpu_time_total=cpu, kernels=own, cpu_children=children)


def test_the_outermost_range_gets_the_time():
    """Microseconds of two steps; what a range holds inside another is the outer one's."""
    inner = event("skv::fetch", 300.0, [20.0, 10.0])
    selection = event("skv::selection", 400.0, [10.0], inner)
    # Ranges show up on the GPU as well, as a stretch of its time with kernels and gaps between them.
    selection.kernels.append(SimpleNamespace(name="skv::selection", duration=900.0))
    span = event("skv::step", 0.0, [])
    span.kernels.append(SimpleNamespace(name="skv::step", duration=950.0))
    step = event("skv::step", 1000.0, [50.0], event("aten::x", 500.0, [10.0], selection))
    on_cpu, on_gpu = (parts_of([step, span, step, span, inner], 2, on_gpu=gpu) for gpu in (False, True))
    assert on_cpu.by_part["selection"] == 0.4
    assert on_cpu.by_part["fetch"] == 0
    assert on_cpu.by_part["other"] == pytest.approx(0.6)
    assert on_cpu.waiting_ms is None
    assert on_gpu.by_part["selection"] == 0.04
    assert on_gpu.by_part["other"] == pytest.approx(0.06)
    assert on_gpu.waiting_ms == pytest.approx(0.9)


def test_no_range_is_opened_where_no_profiler_runs(monkeypatch):
    from torch.autograd import profiler

    from shadowkv.tensors import ops

    def fail(*_):
        raise AssertionError("a range was opened")

    monkeypatch.setattr(profiler, "record_function", fail)
    assert ops.top_indices(torch.tensor([[1.0, 3.0, 2.0]]), 1).tolist() == [[1]]


def test_percentiles_are_of_all_repeats():
    rows = summarise_bench([record("full", 1, 0, 1.0), record("full", 1, 1, 3.0)])
    assert rows[0].step_ms_p50 == np.percentile([1.0] * 5 + [3.0] * 5, 50)
    assert rows[0].repeats == 2
