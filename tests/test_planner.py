"""Plans before anything runs: held to what caches hold and compute, and to what ShadowKV's authors measured."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from test_methods import CASES
from tiny_models import at_its_bound, geometry_model, random_prompt, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from evals.paper.published import ROWS
from evals.tables.planning import Setup, plan_all
from shadowkv.common.dims import Bytes, Dims, KVLayer
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import methods, parse_method
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full
from shadowkv.methods.shadowkv.method import ShadowKV
from shadowkv.models.loading import load_config
from shadowkv.models.model_size import ModelSize, model_size
from shadowkv.models.resolving import resolve
from shadowkv.planning.gpus import GPU, find_gpu, gpus
from shadowkv.planning.planner import Demand, demand_of, plan
from shadowkv.planning.published import published_demand

A100 = find_gpu("a100-80g")
DIMS = Dims(layers=4, q_heads=6, kv_heads=2, head_dim=64, element_bytes=2)
# Round figures, all of which are reached: 1000 bytes per ms of memory, 100 of the link, 10000 operations.
SIMPLE = GPU("simple", 10_000, 1e6, 1e5, 1e7, 1.0, 1.0, 1.0, 1.0, layer_overhead_ms=0.5)
LAYERS = (KVLayer(DIMS.q_heads, DIMS.kv_heads, DIMS.head_dim),) * 4
TINY = ModelSize(
    replace(DIMS, element_bytes=1), parameters=2000, step_parameters=1500, layers=LAYERS, vocab=0, hidden=0
)


def demand(held=100, host=0, read=40, bus=0, flop=0, overlapped=0):
    return Demand("m", {"kv": Bytes(held, host)}, 0, read, bus, flop, overlapped)


@cache
def size_of(name):
    return model_size(load_config(resolve(name, config_only=True)), 2)


# Against what methods hold and compute


@pytest.fixture
def engine(tiny):
    return Engine(tiny("llama"), prefill_chunk_tokens=128, record_queries=True)


@pytest.mark.parametrize("spec", CASES)
def test_planned_bytes_are_those_of_the_running_cache(engine, spec):
    """Weights, device and host of a batch of two, through the planner; a step's workspace comes on top."""
    method = at_its_bound(parse_method(spec))
    size = model_size(engine.model.config, 4)
    made = plan(demand_of(method, engine.dims, 700), size, replace(A100, memory_bytes=10**9), 700, batch=2)
    held = engine.replay(engine.prefill(random_prompt(700, batch=2)), method).nbytes()
    workspace = 2 * made.parts["workspace"].device
    assert made.weight_bytes == sum(x.numel() * x.element_size() for x in engine.model.parameters())
    assert made.device_bytes - made.weight_bytes - workspace == pytest.approx(held.device, rel=0.01)
    assert made.host_bytes == pytest.approx(held.host, rel=0.01)


@pytest.mark.parametrize(
    "spec",
    ["full:engine=reference", "quest:budget=64,dense_layers=1,engine=fast", "shadowkv:rank=8,budget=64,engine=fast"],
)
def test_sliding_windows_are_planned_for(spec):
    engine = Engine(tiny_model("gemma3"), prefill_chunk_tokens=128)
    size, method = model_size(engine.model.config, 4), parse_method(spec)
    held = engine.replay(engine.prefill(random_prompt(700)), method).nbytes()
    planned = Bytes(size.dense_bytes(700), 0) + method.prompt_bytes(size.dims, 700)
    assert planned.device == pytest.approx(held.device, rel=0.01)
    assert len(size.layers) == engine.model.config.num_hidden_layers


@pytest.mark.parametrize("spec", CASES)
def test_planned_operations_are_those_of_a_step(engine, spec):
    """Counted in a step of the whole model, whose matrices are taken off."""
    method = at_its_bound(parse_method(spec))
    if getattr(method, "engine", "auto") == "fast":
        pytest.skip("in plain torch it computes on all of its fixed shapes, also where nothing is held")
    matrices = [x.numel() for name, x in engine.model.named_parameters() if x.dim() == 2 and "embed" not in name]
    cache = engine.replay(engine.prefill(random_prompt(1501)), method)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
        engine.extend(cache, random_prompt(1, seed=3))
    counted = counter.get_total_flops() - 2 * sum(matrices)
    # InfiniGen projects its guess, and at alpha=0 reads fewer than its most; the new token is not in any plan.
    assert method.step_flop(engine.dims, 1501) == pytest.approx(
        counted, rel=0.1 if method.name == "infinigen" else 0.03
    )


@pytest.mark.parametrize(
    ("spec", "elements"),
    [
        ("full", 4 * 2 * 1000 * 128),
        ("snapkv:budget=64", 4 * 2 * 64 * 128),
        ("oracle:budget=64", 4 * 2 * 1000 * 128),
        # 62 pages: their extremes, then keys and values for each of 6 query heads, or once for each of 2 KV heads.
        ("quest:budget=64,dense_layers=0", 4 * (2 * 62 * 128 + 2 * 6 * 64 * 64)),
        ("quest:budget=64,dense_layers=1,reduce=group_max", 2 * 1000 * 128 + 3 * (2 * 62 * 128 + 2 * 2 * 64 * 64)),
        ("quest:budget=2000,dense_layers=0", 4 * 2 * 1000 * 128),
        ("loki:budget=64,rank=16", 4 * (1000 * 2 * 16 + 2 * (2 * 16 * 64) + 2 * 6 * 64 * 64)),  # the basis is fp32
        ("loki:budget=1001", 4 * 2 * 1000 * 128),
        # Partial keys and their skew, of two lists of 16 columns each; what was fetched is read once more.
        ("infinigen:budget=64,ratio=0.25,dense_layers=1", 2 * 1000 * 128 + 3 * (1064 * 2 * 32 + 2 * 6 * 64 * 64)),
        # 119 landmarks with a number of 4 bytes; 64 tokens rebuilt from rows of 8; 64 + 16 + 32 attended to.
        ("shadowkv:budget=64,rank=8,outliers=2", 4 * (119 * 2 * (64 + 2) + 2 * 64 * 8 + 8 * 128 + 2 * 112 * 128)),
        # Every layer reads the coefficients of its group; vectors are its own.
        ("xkv:group=4,rank_k=20,rank_v=24", 4 * (1000 * 44 + 44 * 128)),
    ],
)
def test_bytes_read_by_a_step(spec, elements):
    """In elements of 2 bytes, over four layers."""
    assert parse_method(spec).read_bytes(DIMS, 1000) == elements * 2


@pytest.mark.parametrize("spec", CASES)
def test_more_tokens_never_cost_less(spec):
    method = parse_method(spec)
    for asked in (method.read_bytes, method.step_flop, method.workspace_bytes, method.bus_bytes):
        costs = [asked(DIMS, tokens) for tokens in (16, 64, 300, 1000, 4000)]
        assert costs == sorted(costs)
    assert min(method.read_bytes(DIMS, 16), method.step_flop(DIMS, 16)) > 0


# The roofline


def test_a_step_takes_as_long_as_its_slowest_resource():
    fits = plan(demand(), TINY, SIMPLE, 10)
    assert (fits.max_batch, fits.batch, fits.limited_by) == (80, 80, "device-memory")
    assert fits.device_bytes == 2000 + 80 * 100
    assert fits.times == pytest.approx(((1500 + 80 * 40) / 1000, 0, 80 * 3000 / 10_000, 2.0))
    assert (fits.step_ms, fits.bound_by) == (pytest.approx(24), "flop")
    assert fits.tokens_per_s == pytest.approx(80 / 0.024)
    assert plan(demand(), TINY, SIMPLE, 10, batch=1).bound_by == "overhead"
    assert plan(demand(read=5000), TINY, SIMPLE, 10).bound_by == "hbm"


def test_a_fetch_is_waited_for_unless_work_goes_on_beside_it():
    waits = plan(demand(bus=50, host=1), TINY, SIMPLE, 10, batch=10)
    assert waits.step_ms == pytest.approx(3 + 5 + 2.0)  # arithmetic is longer than memory here
    assert waits.bound_by == "pcie"
    beside = plan(demand(bus=50, host=1, overlapped=300), TINY, SIMPLE, 10, batch=10)
    assert beside.step_ms == pytest.approx(waits.step_ms)
    assert beside.times.hbm == pytest.approx(1.9 + 3)
    longer = plan(demand(bus=50, host=1, overlapped=700), TINY, SIMPLE, 10, batch=10)
    assert longer.step_ms == pytest.approx(3 + 7 + 2.0)


@pytest.mark.parametrize(
    ("limits", "batch", "by"),
    [
        ({}, 80, "device-memory"),
        ({"device_bytes": 5000}, 30, "device-memory"),
        ({"device_bytes": 10**9}, 80, "device-memory"),
        ({"host_bytes": 700}, 70, "host-memory"),
        ({"host_bytes": 9}, 0, "host-memory"),
        ({"device_bytes": 2099}, 0, "device-memory"),
        ({"device_bytes": 100}, 0, "device-memory"),
    ],
)
def test_the_batch_fits_device_and_host(limits, batch, by):
    made = plan(demand(host=10, bus=1), TINY, SIMPLE, 10, **limits)
    assert (made.max_batch, made.limited_by) == (batch, by)
    assert made.host_bytes == 10 * max(batch, 1)
    if not batch:
        assert made.times is made.step_ms is made.tokens_per_s is None
        assert made.bound_by == by


def test_a_given_batch_that_does_not_fit_says_so():
    made = plan(demand(), TINY, SIMPLE, 10, batch=81)
    assert (made.max_batch, made.batch, made.step_ms, made.bound_by) == (80, 81, None, "device-memory")
    assert made.device_bytes == 2000 + 81 * 100


def test_plans_come_in_the_order_asked_with_their_gain():
    asked = [parse_method("quest"), Full()]
    rows = plan_all(Setup("m", size_of("llama3.1-8b"), A100), [8192, 4096], asked)
    assert [(row.plan.context, row.plan.method) for row in rows] == [
        (8192, "quest"), (8192, "full"), (4096, "quest"), (4096, "full"),
    ]  # fmt: skip
    assert rows[1].gain == rows[3].gain == 1
    assert rows[0].gain == pytest.approx(rows[0].plan.tokens_per_s / rows[1].plan.tokens_per_s)


# Against what was published


def near(found, published):
    return abs(found - published) <= max(1, 0.02 * published)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.context // 1024}k")
def test_batch_sizes_of_the_authors(row):
    size = size_of(row.model)
    full = plan(demand_of(Full(), size.dims, row.context), size, A100, row.context)
    assert full.max_batch == row.full_batch
    published = published_demand(ShadowKV(budget=row.budget), size.dims, row.context)
    assert near(plan(published, size, A100, row.context).max_batch, row.shadowkv_batch)
    # With half a percent less memory, still.
    less = replace(A100, memory_share=A100.memory_share * 0.995)
    assert near(plan(published, size, less, row.context).max_batch, row.shadowkv_batch)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.context // 1024}k")
def test_step_times_of_the_authors(row):
    """Residuals: full attention -3.2 to +1.6 %; ShadowKV -4.8 to +5.0 % but for GLM-4 244K (-10 %), Yi 60K (+10 %)."""
    size = size_of(row.model)
    full = plan(demand_of(Full(), size.dims, row.context), size, A100, row.context, batch=row.full_batch)
    assert full.tokens_per_s == pytest.approx(row.full_tokens_per_s, rel=0.05)
    assert full.bound_by == "hbm"
    published = published_demand(ShadowKV(budget=row.budget), size.dims, row.context)
    shadowkv = plan(published, size, A100, row.context, batch=row.shadowkv_batch)
    assert shadowkv.tokens_per_s == pytest.approx(row.shadowkv_tokens_per_s, rel=0.12)
    assert shadowkv.bound_by == "pcie"


def test_most_step_times_of_the_authors_are_near():
    residuals = []
    for row in ROWS:
        size = size_of(row.model)
        published = published_demand(ShadowKV(budget=row.budget), size.dims, row.context)
        made = plan(published, size, A100, row.context, batch=row.shadowkv_batch)
        residuals.append(abs(made.tokens_per_s / row.shadowkv_tokens_per_s - 1))
    assert sorted(residuals)[8] < 0.052


def test_bytes_of_one_sequence_as_published():
    """Llama-3.1-8B at 122K: 16.37 GB full, 2.7 GB ShadowKV, six times less; 183 GiB on the host for 24 sequences."""
    dims = size_of("llama3.1-8b").dims
    parts = published_demand(ShadowKV(), dims, 122 * 1024).parts
    held = sum(parts.values(), Bytes(0, 0))
    full = Full(engine="reference").prompt_bytes(dims, 122 * 1024).device
    assert full / 1e9 == pytest.approx(16.37, abs=0.01)
    assert held.device / 1e9 == pytest.approx(2.69, abs=0.02)
    assert full / held.device == pytest.approx(6.09, abs=0.03)
    assert 24 * held.host / 2**30 == pytest.approx(183, abs=1)


@pytest.mark.parametrize("spec", ["shadowkv:values=int8", "shadowkv:energy=0.9", "shadowkv:budget=4096"])
def test_the_published_engine_has_no_such_setting(spec):
    with pytest.raises(SkvError, match="the published engine"):
        published_demand(parse_method(spec), DIMS, 4096)


# Models


def test_an_embedding_of_its_own_is_held_but_not_read():
    untied, tied = model_size(geometry_model(2, 16).config, 4), size_of("smollm2-135m")
    assert untied.parameters - untied.step_parameters == untied.vocab * geometry_model(2, 16).config.hidden_size
    assert tied.parameters == tied.step_parameters


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("deepseek_v3", "MLA"),
        ("mamba", "not supported|keeps no keys and values"),
        ("vit", "cannot be built as a decoder"),
        ("mistral", "no layer of this model sees its whole context"),
    ],
)
def test_models_that_no_method_serves_are_refused(kind, says):
    with pytest.raises(SkvError, match=says):
        model_size(AutoConfig.for_model(kind), 2).require_served()


def test_every_method_can_be_planned_for_every_preset():
    from shadowkv.models.presets import presets

    for name, preset in presets().items():
        size = size_of(name)
        for method in [cls() for cls in methods().values()]:
            try:
                method.check(size.dims)
            except SkvError:
                continue
            made = plan(
                demand_of(method, size.dims, preset.context_tokens), size, find_gpu("h200"), preset.context_tokens
            )
            assert made.max_batch == 0 or made.step_ms > 0


# GPUs


def test_the_table_of_gpus_is_in_bounds():
    for gpu in gpus().values():
        assert 20e9 < gpu.usable_bytes < gpu.memory_bytes < 200e9
        assert 0 < gpu.link_bytes_per_s < gpu.bandwidth_bytes_per_s < gpu.flop_per_s
        for share in (gpu.memory_share, gpu.bandwidth_share, gpu.link_share, gpu.flop_share):
            assert 0 < share <= 1
        assert gpu.source
    assert A100.achieved[:2] == pytest.approx((1600e9, 23.3e9))
    assert find_gpu("H200").achieved[:2] == pytest.approx((3840e9, 46.6e9))


@pytest.mark.parametrize("name", ["mine.json", "mine.yaml", "mine.yml"])
def test_a_gpu_can_be_described_in_a_file(name, tmp_path):
    import json

    said = {"memory_bytes": "24GiB", "bandwidth_bytes_per_s": 1e12, "link_bytes_per_s": "32GB", "flop_per_s": "1e14"}
    (tmp_path / name).write_text(json.dumps({**said, "memory_share": 0.5}))
    gpu = find_gpu(str(tmp_path / name))
    assert (gpu.name, gpu.memory_bytes, gpu.usable_bytes) == ("mine", 24 * 2**30, 12 * 2**30)
    assert (gpu.bandwidth_bytes_per_s, gpu.link_bytes_per_s, gpu.flop_per_s) == (1e12, 32e9, 1e14)
    assert name in gpu.source


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid YAML"),
        ("- 1", "does not describe a GPU"),
        ("", "does not describe a GPU"),
        ("memory_bytes: 24GB", "lacks bandwidth_bytes_per_s, link_bytes_per_s, flop_per_s"),
        ("memory_byte: 24GB", "did you mean 'memory_bytes'"),
        ("memory_bytes: much", "'much' is not a size"),
        ("memory_bytes: -1", "not a positive number"),
        ("memory_bytes: [1]", "not a positive number"),
        ("memory_bytes: true", "not a positive number"),
        ("memory_bytes: .nan", "not a positive number"),
        ("memory_bytes: 0", "larger than 0"),
        ("link_share: 3", "not a share"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_descriptions_are_one_clear_line(text, says, tmp_path):
    path = tmp_path / "gpu.yaml"
    path.write_text(text)
    with pytest.raises(SkvError) as caught:
        find_gpu(str(path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_gpus_name_the_nearest():
    with pytest.raises(SkvError, match="did you mean 'rtx4090'"):
        find_gpu("rtx-4090")
    with pytest.raises(SkvError, match="cannot read"):
        find_gpu("absent.yaml")
