"""Every kernel gives what its plain-torch twin gives: in Triton's interpreter and, with `-m gpu`, on a GPU."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, key_inputs, paired_table
from tiny_models import random_prompt, tiny_model

from evals.bench.kernels.cases import (
    attention_inputs,
    choose_inputs,
    filling,
    pages_inputs,
    plan_inputs,
    poisoned,
    scores_inputs,
    stored_values,
)
from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.kernels import slots
from shadowkv.kernels.slots import Regions
from shadowkv.tensors.pinned import empty_pinned

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
GEOMETRIES = [
    Case(),
    Case(group=1, head_dim=128, chunks=130),
    Case(heads=1, group=7, head_dim=96, chunks=17, slots=5, chunk=5, rank=33),
    Case(batch=1, heads=3, group=4, head_dim=256, slots=16, chunk=4, rank=8),
    Case(head_dim=16, chunk=3, slots=6, rank=50),
    Case(batch=1, heads=1, group=8, head_dim=80, chunks=21),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(got, wanted, dtype=torch.float32):
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(got, wanted, rtol=bound, atol=bound)


def kernels():
    from shadowkv.kernels import twins

    return twins


@pytest.mark.usefixtures("kernel_device")  # kernels are imported here
def test_twins_have_the_same_names_and_signatures():
    for name in kernels().__all__:
        twin, kernel = (inspect.signature(getattr(module, name)) for module in (slots, kernels()))
        assert list(twin.parameters) == list(kernel.parameters), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_chunk_scores(kernel_device, case, dtype):
    case = replace(case, dtype=dtype, device=kernel_device)
    inputs = scores_inputs(case, [case.chunks, 3][: case.batch])
    close(kernels().chunk_scores(**inputs), slots.chunk_scores(**inputs))


def test_scores_of_rows_without_chunks(kernel_device):
    inputs = scores_inputs(Case(device=kernel_device), [0, 1])
    scores = kernels().chunk_scores(**inputs)
    close(scores, slots.chunk_scores(**inputs))
    assert (scores[0] == -torch.inf).all()


def test_scores_over_many_blocks(kernel_device):
    case = Case(batch=1, heads=1, chunks=128 * 66 + 5, head_dim=16, device=kernel_device)
    inputs = scores_inputs(case, [128 * 66 + 1])
    inputs["landmarks"][:, :, 128 * 65 :] *= 3  # the largest logits come last
    close(kernels().chunk_scores(**inputs), slots.chunk_scores(**inputs))


@pytest.mark.parametrize(
    "make",
    [
        torch.rand,
        lambda *shape: torch.randint(0, 3, shape).float() / 2,  # ties
        lambda *shape: torch.zeros(shape),
        lambda *shape: torch.where(torch.rand(shape) < 0.9, -torch.inf, torch.rand(shape)),  # fewer than slots
        lambda *shape: torch.full(shape, -torch.inf),
        torch.randn,
        lambda *shape: -torch.rand(shape),
        lambda *shape: torch.randint(-2, 2, shape).float() * 0.0,  # both zeros are a tie
        lambda *shape: torch.where(torch.rand(shape) < 0.1, torch.inf, torch.randn(shape)),
        lambda *shape: torch.rand(shape) * 1e-42,  # denormal
    ],
)
@pytest.mark.parametrize("case", [Case(), Case(chunks=5), Case(chunks=100, slots=37), Case(chunks=8, slots=8)], ids=str)
def test_choose_chunks(kernel_device, case, make):
    inputs = choose_inputs(replace(case, device=kernel_device), make)
    assert torch.equal(kernels().choose_chunks(**inputs), slots.choose_chunks(**inputs))


@pytest.mark.parametrize(("block", "step"), [(16, 16), (128, 16), (32, 8)])
@pytest.mark.parametrize("values", [9, 1000])
def test_choose_chunks_over_several_blocks(kernel_device, monkeypatch, values, block, step):
    """Of which none, or some, are held while the threshold is looked for, and few at a time are written."""
    from shadowkv.kernels import choose

    monkeypatch.setattr(choose, "_LARGEST_BLOCK", block)
    monkeypatch.setattr(choose, "_STEP", step)
    case = Case(chunks=70, slots=40, device=kernel_device)
    inputs = choose_inputs(case, lambda *shape: torch.randint(0, values, shape).float())
    assert torch.equal(kernels().choose_chunks(**inputs), slots.choose_chunks(**inputs))


def test_what_lies_between_rows_of_scores_is_not_chosen(kernel_device):
    """Rows that are filled up to where the next begins, and ones at the very end of what is held."""
    case = Case(chunks=21, device=kernel_device)
    inputs = choose_inputs(case, torch.rand)
    wide = torch.full((case.batch, case.heads, 32), torch.inf, device=kernel_device)
    wide[..., :21] = inputs["scores"]
    behind = torch.full((case.batch, case.heads, 32), torch.inf, device=kernel_device)
    behind[..., 11:] = inputs["scores"]
    wanted = slots.choose_chunks(**inputs)
    for scores in (wide[..., :21], behind[..., 11:], inputs["scores"].mT.contiguous().mT):
        assert torch.equal(kernels().choose_chunks(**(inputs | {"scores": scores})), wanted)


def test_scores_lie_as_they_are_read(kernel_device):
    from shadowkv.kernels.launch import readable_columns

    inputs = scores_inputs(Case(chunks=21, device=kernel_device), [21, 20])
    scores = kernels().chunk_scores(**inputs)
    assert scores.shape[-1] == 21
    assert scores.stride()[:2] == (64, 32)
    assert readable_columns(scores) == 32
    assert readable_columns(scores.contiguous()) == 21
    assert readable_columns(torch.rand(2, 2, 21)[..., 5:]) == 16


@pytest.mark.parametrize(
    ("chosen", "held", "shared"),
    [(8, 8, 8), (8, 8, 0), (8, 8, 5), (8, 0, 0), (5, 3, 2), (5, 5, 0), (0, 0, 0), (1, 0, 0)],
)
@pytest.mark.parametrize("many", [1, 9])
def test_plan_fill(kernel_device, chosen, held, shared, many):
    chosen, held, shared = chosen * many, held * many, shared * many
    inputs = plan_inputs(Case(slots=8 * many, device=kernel_device), chosen, held, shared)
    twin, kernel = ({name: x.clone() for name, x in inputs.items()} for _ in range(2))
    fill = kernels().plan_fill(**kernel)
    assert torch.equal(fill, slots.plan_fill(**twin))
    assert torch.equal(kernel["held"], twin["held"])
    # What it is for: all chosen are held, and what was held already did not move.
    assert torch.equal(kernel["held"][..., :chosen].sort(-1).values, inputs["chosen"][..., :chosen])
    stayed = kernel["held"] == inputs["held"]
    assert int((fill >= 0).sum()) == 4 * (chosen - shared)
    assert stayed[..., :held].sum() == 4 * shared + 4 * max(held - chosen, 0)


@pytest.mark.parametrize("fills", [0, 3, 5])
@pytest.mark.parametrize("values", ["native", "bf16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_fill_values(kernel_device, case, values, fills):
    dtype = torch.bfloat16 if case.head_dim == 96 else torch.float32
    case = replace(case, values=values, dtype=dtype, device=kernel_device)
    stored, plan = stored_values(case), filling(case, fills)
    blank = poisoned(case.randn(case.batch, case.heads, case.slots * case.chunk + 3, case.head_dim))
    got, wanted = blank.clone(), blank.clone()
    kernels().fill_values(stored, **plan, out=got)
    slots.fill_values(stored, **plan, out=wanted)
    bound = 1e-6 if case.dtype == torch.float32 else 2**-7  # the interpreter rounds to bf16 by cutting off
    torch.testing.assert_close(got, wanted, rtol=bound, atol=1e-6, equal_nan=True)
    assert int(got.isnan().any(-1).sum()) == case.batch * case.heads * (blank.shape[2] - fills * case.chunk)


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["native", "int8", "fp8", "int4"])
def test_values_are_read_from_pinned_memory(values):
    """Nothing but the kernel moves them: it reads the host's memory itself."""
    case = Case(values=values, dtype=torch.bfloat16, head_dim=128, device="cuda")
    stored, plan = stored_values(case), filling(case, 5)
    pinned = [empty_pinned(part.shape, part.dtype).copy_(part) for part in stored.parts]
    got, wanted = (torch.zeros(case.batch, case.heads, 64, 128, dtype=case.dtype, device="cuda") for _ in range(2))
    kernels().fill_values(stored._replace(parts=tuple(pinned)), **plan, out=got)
    slots.fill_values(stored, **plan, out=wanted)
    close(got, wanted, case.dtype)


def test_every_byte_of_fp8_is_read_as_torch_reads_it(kernel_device):
    codes = torch.arange(256, device=kernel_device).to(torch.uint8).view(torch.int8)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)  # NaN, which is never written
    from shadowkv.tensors.stored import Stored

    case = Case(batch=1, heads=1, head_dim=256, chunks=1, slots=1, chunk=1, device=kernel_device)
    scales = torch.ones(1, 1, 1, 1, dtype=torch.float16, device=kernel_device)
    stored = Stored("fp8", (codes.view(1, 1, 1, 256), scales))
    got, wanted = (torch.zeros(1, 1, 1, 256, device=kernel_device) for _ in range(2))
    kernels().fill_values(stored, **filling(case, 1), out=got)
    slots.fill_values(stored, **filling(case, 1), out=wanted)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("fills", [0, 5])
@pytest.mark.parametrize("factors", ["native", "int8"])
@pytest.mark.parametrize("case", [*GEOMETRIES, Case(family="glm"), Case(family="llama-yarn")], ids=str)
def test_fill_keys(kernel_device, case, factors, fills):
    dtype = torch.bfloat16 if case.head_dim == 128 else torch.float32
    case = replace(case, factors=factors, dtype=dtype, device=kernel_device)
    inputs, plan = key_inputs(case), filling(case, fills)
    blank = poisoned(case.randn(case.batch, case.heads, case.slots * case.chunk + 3, case.head_dim))
    got, wanted = blank.clone(), blank.clone()
    kernels().fill_keys(**inputs, **plan, out=got)
    slots.fill_keys(**inputs, **plan, out=wanted)
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
    assert int(got.isnan().any(-1).sum()) == case.batch * case.heads * (blank.shape[2] - fills * case.chunk)


WAYS = ["halves", "scaled", "neighbours", "part in halves", "part as neighbours", "still", "mirrored"]


@pytest.mark.parametrize("factors", ["native", "int8"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "case",
    [
        Case(head_dim=80, chunk=5, slots=15, rank=33),
        Case(batch=1, head_dim=256, slots=9),
        Case(batch=1, head_dim=128, dtype=torch.bfloat16),
        Case(head_dim=16, dtype=torch.float16),
    ],
    ids=str,
)
def test_keys_of_any_pairing(kernel_device, case, way, factors):
    """Also of more rows and tiles than there are programs."""
    from shadowkv.kernels import rebuild

    case = replace(case, factors=factors, device=kernel_device)
    table, plan = paired_table(case, way), filling(case, case.slots - 1)
    assert (table.pairing is None) == (way == "mirrored"), "only these have a kernel that reads channels by index"
    inputs = key_inputs(case, table)
    blank = poisoned(case.randn(case.batch, case.heads, case.slots * case.chunk + 3, case.head_dim))
    got, wanted = blank.clone(), blank.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuild, "processors", lambda device: 1)
        kernels().fill_keys(**inputs, **plan, out=got)
    slots.fill_keys(**inputs, **plan, out=wanted)
    bound = TOLERANCE[case.dtype]
    torch.testing.assert_close(got, wanted, rtol=bound, atol=bound, equal_nan=True)


REGIONS = Regions(slots=64, outliers=16, ring=53)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("regions", "spans"),
    [
        (REGIONS, [[64, 16, 40, 50], [24, 8, 0, 1]]),
        (REGIONS, [[0, 0, 52, 1], [0, 0, 0, 53]]),
        (Regions(0, 0, 200), [[0, 0, 0, 200], [0, 0, 0, 7]]),
    ],
)
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_attend_resident(kernel_device, case, regions, spans, dtype):
    inputs = attention_inputs(replace(case, dtype=dtype, device=kernel_device), regions, spans[: case.batch])
    got = kernels().attend_resident(**inputs)
    assert torch.isfinite(got).all()
    close(got, slots.attend_resident(**inputs), dtype)


AT_ONCE = 3 * 132  # programs of attention on an H100


@pytest.mark.usefixtures("kernel_device")  # kernels are imported here
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 12, 14, 24, 25, 28, 32, 48])
def test_a_gpu_is_evenly_busy_with_full_attention(batch):
    from shadowkv.kernels.launch import blocks_each

    blocks, rows = 1952, batch * 8  # 122K tokens of Llama 3.1 8B
    each = blocks_each(blocks, rows, AT_ONCE, 128)
    turns = -(-rows * -(-blocks // each) // AT_ONCE)
    assert blocks * rows > 0.85 * turns * each * AT_ONCE, "else programs wait for others' last blocks"


@pytest.mark.usefixtures("kernel_device")
@pytest.mark.parametrize("rows", [1, 3, 8, 56, 397, 5000])
@pytest.mark.parametrize("blocks", [1, 2, 43, 1952, 15625])
def test_programs_of_a_row_cover_it_and_are_few_enough_to_be_joined(blocks, rows):
    from shadowkv.kernels.launch import blocks_each

    each = blocks_each(blocks, rows, AT_ONCE, 128)
    assert 1 <= each <= blocks
    assert -(-blocks // each) <= 128
    assert rows < AT_ONCE * 4 or each == blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_page_bounds(kernel_device, case, dtype):
    inputs = pages_inputs(replace(case, dtype=dtype, device=kernel_device), [case.tokens - 3, case.chunk][: case.batch])
    asked = {name: inputs[name] for name in ("q", "low", "high", "lengths", "page")}
    got = kernels().page_bounds(**asked)
    close(got, slots.page_bounds(**asked))
    assert (got == torch.inf).sum() == case.batch * case.heads * case.group, "the newest page alone, in each list"
    assert (got[1:, ..., 1:] == -torch.inf).all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_attend_pages(kernel_device, case, dtype, shared):
    """A full list, and one of a row of a single page, of which one token is there."""
    inputs = pages_inputs(replace(case, dtype=dtype, device=kernel_device), [case.tokens - 1, 1][: case.batch], shared)
    asked = {name: inputs[name] for name in ("q", "k", "v", "pages", "lengths", "page", "scaling")}
    got = kernels().attend_pages(**asked)
    assert torch.isfinite(got).all()
    close(got, slots.attend_pages(**asked), dtype)


@pytest.mark.parametrize("reduce", ["per_q_head", "group_mean"])
def test_steps_over_pages_on_kernels_equal_the_reference(kernel_device, reduce):
    engine = Engine(tiny_model("llama", num_hidden_layers=1).to(kernel_device), prefill_chunk_tokens=128)
    prefill = engine.prefill(random_prompt(46, batch=2).to(kernel_device))
    spec = f"quest:budget=32,page=8,dense_layers=0,reduce={reduce}"
    reference, fast = (engine.replay(prefill, parse_method(f"{spec},engine={e}")) for e in ("reference", "fast"))
    for token in (
        random_prompt(4, batch=2, seed=5).to(kernel_device).split(1, dim=1)
    ):  # a page fills, and another one opens
        torch.testing.assert_close(engine.extend(fast, token), engine.extend(reference, token), rtol=1e-4, atol=1e-4)


def test_two_hundred_steps_on_kernels_equal_the_reference(kernel_device):
    # One layer and one head: the interpreter takes milliseconds per operation of a block.
    engine = Engine(tiny_model("llama-mqa", num_hidden_layers=1).to(kernel_device), prefill_chunk_tokens=128)
    prefill = engine.prefill(random_prompt(120).to(kernel_device))
    spec = "shadowkv:rank=6,budget=32,outliers=1,local=1,window=8"
    reference, fast = (engine.replay(prefill, parse_method(f"{spec},engine={e}")) for e in ("reference", "fast"))
    for token in random_prompt(200, seed=5).to(kernel_device).split(1, dim=1):
        torch.testing.assert_close(engine.extend(fast, token), engine.extend(reference, token), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coding", ["values=int4,factors=int8", "values=fp8,offload=none"])
def test_batches_on_kernels_equal_the_reference(kernel_device, coding):
    engine = Engine(tiny_model("llama").to(kernel_device), prefill_chunk_tokens=128)
    prefill = engine.prefill(random_prompt(120, batch=2).to(kernel_device))
    spec = f"shadowkv:rank=12,budget=32,outliers=1,window=2,{coding}"
    reference, fast = (engine.replay(prefill, parse_method(f"{spec},engine={e}")) for e in ("reference", "fast"))
    for token in random_prompt(12, batch=2, seed=5).to(kernel_device).split(1, dim=1):
        torch.testing.assert_close(engine.extend(fast, token), engine.extend(reference, token), rtol=1e-4, atol=1e-4)
