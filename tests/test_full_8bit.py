"""Full attention in 8 bits: how far it may be off, what it holds, and its kernel beside its twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case
from test_kernels import close, kernels
from test_stored import RELATIVE_TO_LARGEST
from tiny_models import geometry_model, random_prompt, tiny_model

from evals.bench.kernels.cases import codes_inputs
from shadowkv.common.dims import Bytes, Dims
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import LayerKV
from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.kernels import slots
from shadowkv.tensors import ops
from shadowkv.tensors.stored import CODINGS, Stored

CODED = ("int8", "fp8")
ENGINES = ("reference", "fast")
# What attention is off by, over what comes out, at most in 40 draws of keys and values, where weights are over many
# tokens and, with scores three times as large, over few: docs/methods/full.md says so.
USUAL_ERROR = {("int8", 1.0): 0.015, ("int8", 3.0): 0.035, ("fp8", 1.0): 0.05, ("fp8", 3.0): 0.12}
GEOMETRIES = [
    Case(group=1, head_dim=64),
    Case(group=7, head_dim=80, heads=1, chunks=21),
    Case(group=8, head_dim=128, batch=1, chunks=33),
    Case(group=4, head_dim=256, batch=1, heads=1),
    Case(group=3, head_dim=16, chunks=3),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def layer_of(coding, engine, k, v):
    kv = LayerKV(k, v, k[:, :, -1:], 1.0)
    return parse_method(f"full:kv={coding},engine={engine}").new_layer(0, kv, None)


def one_step(coding, engine, q, k, v, scaling):
    """The last token of k and v comes as a step."""
    layer = layer_of(coding, engine, k[:, :, :-1], v[:, :, :-1])
    return layer.attend(q, k[:, :, -1:], v[:, :, -1:], scaling)


# How far it may be off


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("coding", CODED)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (7, 80), (8, 128), (4, 256)])
def test_errors_stay_within_what_half_a_step_can_do(coding, engine, group, head_dim):
    """A score is off by |q| times half a step of its key, a weight by that twice over, a value by half a step."""
    q, k, v = (torch.randn(2, heads, tokens, head_dim) for heads, tokens in ((2 * group, 1), (2, 500), (2, 500)))
    k[:, :, 3] *= 8  # a few tokens that weigh more, and ones whose values are far larger than the others'
    v[:, :, 7] *= 30
    scaling, half_step = head_dim**-0.5, RELATIVE_TO_LARGEST[coding]
    exact, got = ops.attend(q, [(k, v)], scaling), one_step(coding, engine, q, k, v, scaling)
    off = scaling * q.abs().sum(-1).amax() * half_step * k.abs().amax(-1)
    shift = torch.expm1(2 * off.amax())
    bound = shift * v.abs().amax() + half_step * v.abs().amax()
    assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("coding", CODED)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_on_random_data_errors_are_a_few_per_cent(coding, engine, head_dim, sharpness):
    """Weights over many tokens and over few. Less than a twentieth of it would be no error of 8 bits."""
    q, k, v = (torch.randn(1, 8, tokens, head_dim) for tokens in (1, 1000, 1000))
    scaling = sharpness * head_dim**-0.5
    exact, got = ops.attend(q, [(k, v)], scaling), one_step(coding, engine, q, k, v, scaling)
    error = ((got - exact).norm() / exact.norm()).item()
    assert USUAL_ERROR[coding, sharpness] / 20 < error < USUAL_ERROR[coding, sharpness]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("coding", "top"), [("int8", 127), ("fp8", 448)])
def test_a_single_token_comes_back_exactly_where_its_codes_can_say_it(coding, engine, top):
    """Its weight is 1 whatever its key is; multiples of a power of two, of which the largest is `top`, are codes."""
    numbers = torch.arange(64) % 8 * 8.0  # with up to three bits behind the first
    v = torch.stack((numbers, -numbers.flip(0)))[None, :, None] * 2.0**-9
    v[..., 0] = top * 2.0**-9
    q, k = torch.randn(1, 6, 1, 64), torch.randn(1, 2, 1, 64)
    assert torch.equal(one_step(coding, engine, q, k, v, 0.1), v.repeat_interleave(3, dim=1))
    off = v + torch.rand_like(v) * 2.0**-13
    got = one_step(coding, engine, q, k, off, 0.1)
    decoded = CODINGS[coding].decode(*CODINGS[coding].encode(off)).repeat_interleave(3, dim=1)
    torch.testing.assert_close(got, decoded, rtol=1e-6, atol=0)
    assert not torch.equal(got, off.repeat_interleave(3, dim=1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("coding", CODED)
def test_tokens_of_zeros_are_tokens_of_zeros(coding, engine):
    """As keys they score nothing, as values they give nothing, and neither makes anything else inexact."""
    q, k, v = (torch.randn(1, 2, tokens, 64) for tokens in (1, 9, 9))
    k[:, :, 2], v[:, :, 5:] = 0, 0
    exact, got = ops.attend(q, [(k, v)], 0.125), one_step(coding, engine, q, k, v, 0.125)
    assert ((got - exact).norm() / exact.norm()).item() < USUAL_ERROR[coding, 3.0]
    nothing = one_step(coding, engine, q, k * 0, v * 0, 0.125)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("coding", CODED)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_came_before_or_with_a_token_does_not_change_its_codes(coding, engine):
    """A prompt, or one by one, or several at once: the same bits."""
    k, v = (torch.randn(2, 2, 30, 64) for _ in range(2))
    q = torch.randn(2, 4, 30, 64)
    whole = layer_of(coding, engine, k[:, :, :29], v[:, :, :29])
    grown = layer_of(coding, engine, k[:, :, :10], v[:, :, :10])
    grown.attend(q[:, :, 10:20], k[:, :, 10:20], v[:, :, 10:20], 0.1)
    for t in range(20, 29):
        grown.attend(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], 0.1)
    last = (q[:, :, 29:], k[:, :, 29:], v[:, :, 29:], 0.1)
    assert torch.equal(grown.attend(*last), whole.attend(*last))


# The kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("coding", CODED)
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_attend_codes(kernel_device, case, coding, dtype):
    """A row that is full but for a token, and one of a single token; what is beyond them reads as NaN."""
    case = replace(case, values=coding, dtype=dtype, device=kernel_device)
    inputs = codes_inputs(case, [case.tokens - 1, 1][: case.batch])
    got = kernels().attend_codes(**inputs)
    assert torch.isfinite(got).all()
    close(got, slots.attend_codes(**inputs), dtype)


@pytest.mark.parametrize("coding", CODED)
def test_small_values_are_not_lost_in_fp16(kernel_device, coding):
    """A token that takes most and gives nothing: weights of all others times their scales are no numbers of fp16."""
    k, v = torch.zeros(1, 1, 1024, 64), torch.rand(1, 1, 1024, 64) * 2.0**-9
    k[:, :, 0, 0], v[:, :, 0] = 9.0, 0.0
    q, length = torch.zeros(1, 1, 1, 64, dtype=torch.float16), torch.tensor([1024], dtype=torch.int32)
    q[..., 0] = 1.0
    stored = [Stored(coding, tuple(part.to(kernel_device) for part in CODINGS[coding].encode(x))) for x in (k, v)]
    inputs = (q.to(kernel_device), *stored, length.to(kernel_device), 1.0)
    torch.testing.assert_close(kernels().attend_codes(*inputs), slots.attend_codes(*inputs), rtol=0.01, atol=2.0**-24)


def test_every_byte_of_fp8_is_attended_to_as_torch_reads_it(kernel_device):
    codes = torch.arange(256, device=kernel_device).to(torch.uint8).view(torch.int8)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes).view(1, 1, 1, 256)  # but NaN, which is never written
    one = torch.ones(1, 1, 1, 1, dtype=torch.float16, device=kernel_device)
    q, length = torch.ones(1, 1, 1, 256, device=kernel_device), torch.ones(1, dtype=torch.int32, device=kernel_device)
    stored = Stored("fp8", (codes, one))
    assert torch.equal(kernels().attend_codes(q, stored, stored, length, 1e-3), CODINGS["fp8"].decode(codes, one))


@pytest.mark.parametrize("coding", CODED)
def test_steps_on_kernels_equal_the_reference(kernel_device, coding):
    """Rows of different lengths, joined after they were built, past the spare room."""
    engine = Engine(tiny_model("llama-mqa", num_hidden_layers=1).to(kernel_device), prefill_chunk_tokens=128)
    prompts = [random_prompt(n, seed=n).to(kernel_device) for n in (46, 9)]
    caches = {}
    for name in ENGINES:
        method = parse_method(f"full:kv={coding},engine={name}")
        rows = [engine.adopt(engine.prefill(prompt).recording, method) for prompt in prompts]
        caches[name] = engine.join(rows, method)
    assert caches["fast"].stacked
    for token in random_prompt(135, batch=2, seed=5).to(kernel_device).split(1, dim=1):
        left, right = (engine.extend(caches[name], token) for name in ENGINES)
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("coding", CODED)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (7, 80), (8, 128), (1, 256)])
def test_engines_agree_on_a_whole_model(group, head_dim, coding):
    engine = Engine(geometry_model(group, head_dim), prefill_chunk_tokens=128)
    prefill = engine.prefill(random_prompt(90, batch=2))
    reference, fast = (engine.replay(prefill, parse_method(f"full:kv={coding},engine={e}")) for e in ENGINES)
    for turn in random_prompt(12, batch=2, seed=3).split([1, 1, 9, 1], dim=1):
        left, right = engine.extend(fast, turn), engine.extend(reference, turn)
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


# What it holds


@pytest.mark.parametrize("coding", CODED)
def test_bytes_are_those_of_codes_and_scales_to_the_byte(tiny, coding):
    """A byte per channel and two for the scale, of a key and a value, per layer and head; room on the fast engine."""
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    dims, tokens = engine.dims, 77
    token_bytes = 2 * dims.layers * dims.kv_heads * (dims.head_dim + 2)
    prefill = engine.prefill(random_prompt(tokens))
    method = parse_method(f"full:kv={coding},engine=reference")
    assert method.bytes_per_token(dims) == Bytes(token_bytes, 0)
    assert method.memory_parts(dims, tokens) == {"codes and scales": Bytes(tokens * token_bytes, 0)}
    assert engine.replay(prefill, method).nbytes() == Bytes(tokens * token_bytes, 0)
    fast = parse_method(f"full:kv={coding},engine=fast")
    planned, spans = fast.prompt_bytes(dims, tokens).device, 16 * dims.layers
    assert planned == (tokens + 128) * token_bytes
    assert engine.replay(prefill, fast).nbytes() == Bytes(planned + spans, 0)
    assert (fast.read_bytes(dims, tokens), method.read_bytes(dims, tokens)) == (tokens * token_bytes,) * 2
    assert fast.workspace_bytes(dims, tokens) == 0
    assert method.workspace_bytes(dims, tokens) == 2 * tokens * dims.width * dims.element_bytes


def test_a_plan_of_eight_bits_holds_nearly_twice_as_many():
    dims = Dims(32, 32, 8, 128, 2, device="cuda")
    native, coded = (parse_method(spec) for spec in ("full", "full:kv=fp8"))
    assert native.read_bytes(dims, 1000) / coded.read_bytes(dims, 1000) == pytest.approx(256 / 130)
    assert native.prompt_bytes(dims, 1000).device / coded.prompt_bytes(dims, 1000).device == pytest.approx(256 / 130)
    assert native.step_flop(dims, 1000) == coded.step_flop(dims, 1000)


def test_what_is_lossless_has_no_codes():
    dims = Dims(2, 2, 2, 64, 2)
    assert parse_method("full:kv=int8,engine=fast").lossless(dims, 10).label == "full:engine=fast"


@pytest.mark.parametrize("kv", ["int9", "bf16", "int4"])
def test_other_codings_are_refused(kv):
    with pytest.raises(SkvError, match=rf"full: kv={kv} is unknown.*one of native, int8, fp8"):
        parse_method(f"full:kv={kv}")
