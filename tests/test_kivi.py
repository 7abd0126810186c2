"""What only KIVI promises."""

from __future__ import annotations

import pytest
import torch

from shadowkv.common.dims import Dims
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import LayerKV
from shadowkv.methods.compression.kivi import Kivi
from shadowkv.tensors.quantise import QuantisedTokens, pack, quantise, unpack


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(x, bits, group, axis):
    """The definition, one group at a time. x [n,D]; groups run along `axis`. Returns what decodes, and the steps."""
    out, steps = torch.empty_like(x), torch.empty_like(x)
    lines, back, line_steps = (x.T, out.T, steps.T) if axis == 0 else (x, out, steps)
    for i, line in enumerate(lines):
        for start in range(0, len(line), group):
            part = line[start : start + group]
            zero = part.min().half().float()
            step = ((part.max() - zero) / (2**bits - 1)).half().float()
            step = step if step > 0 else torch.tensor(1.0)
            codes = [min(max(round(((e - zero) / step).item()), 0), 2**bits - 1) for e in part]
            back[i, start : start + group] = torch.tensor(codes) * step + zero
            line_steps[i, start : start + group] = step
    return out, steps


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_packing_round_trips(bits, head_dim):
    codes = torch.randint(0, 2**bits, (2, 3, 5, head_dim), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_blocks_decode_as_the_naive_quantiser_says(bits, head_dim):
    x = rand(1, 2, 64, head_dim) * torch.logspace(-3, 3, head_dim)
    for axis, block in ((0, (32, 1)), (1, (1, 32))):
        got = QuantisedTokens(x, bits, *block).decode()
        for head in range(2):
            expected, step = naive(x[0, head], bits, 32, axis)
            torch.testing.assert_close(got[0, head], expected)
            assert ((got[0, head] - x[0, head]).abs() <= 0.66 * step + 1e-3 * x[0, head].abs()).all()


def test_values_on_the_grid_and_constant_groups_are_exact():
    grid = torch.randint(0, 4, (1, 1, 32, 64)) * 0.25 - 1.5
    grid[:, :, 0], grid[:, :, 1] = -1.5, -0.75  # every channel spans its grid
    assert torch.equal(QuantisedTokens(grid, 2, 32, 1).decode(), grid)
    constant = torch.full((1, 1, 32, 64), 7.25)
    assert torch.equal(QuantisedTokens(constant, 2, 32, 1).decode(), constant)


def test_numbers_that_fp16_cannot_hold_stay_finite():
    codes, scale, zero = quantise(torch.tensor([[-3e5, 3e5, 1.0, 1e-9]]), 2, dims=(1,))
    assert torch.isfinite(codes.float() * scale.float() + zero.float()).all()


@pytest.mark.parametrize("prompt", [5, 45])
@pytest.mark.parametrize("groups", [1, 3, 4])
def test_each_step_sees_old_tokens_in_codes_and_new_ones_exactly(groups, prompt):
    """By the definition, over enough steps that the residual fills twice."""
    method, steps, dim = Kivi(bits=4, group=8, residual=16), 40, 16
    k, v = rand(1, 1, prompt + steps, dim, seed=1), rand(1, 1, prompt + steps, dim, seed=2)
    q = 2 * rand(1, groups, steps, dim, seed=3)
    state = method.new_layer(0, LayerKV(k[:, :, :prompt], v[:, :, :prompt], q[:, :, :0], 0.3), rope=None)
    for t in range(steps):
        tokens = prompt + t + 1
        old_k, old_v = (tokens - 1) // 16 * 16, max(tokens - 1 - 16, 0)
        keys, values = k[0, 0, :tokens].clone(), v[0, 0, :tokens].clone()
        keys[:old_k], _ = naive(keys[:old_k], 4, 8, axis=0)
        values[:old_v], _ = naive(values[:old_v], 4, 8, axis=1)
        out = state.attend(q[:, :, t : t + 1], k[:, :, tokens - 1 : tokens], v[:, :, tokens - 1 : tokens], 0.3)
        torch.testing.assert_close(out[0, :, 0], (q[0, :, t] @ keys.T * 0.3).softmax(-1) @ values)


def test_streamed_tokens_are_held_as_if_they_had_been_prompt():
    k, v = rand(1, 2, 200, 16, seed=1), rand(1, 2, 200, 16, seed=2)
    q, method = rand(1, 2, 200, 16, seed=3), Kivi(group=8, residual=32)
    at_once = method.new_layer(0, LayerKV(k, v, q, 0.3), rope=None)
    streamed = method.new_layer(0, LayerKV(k[:, :, :50], v[:, :, :50], q, 0.3), rope=None)
    streamed.attend(q[:, :, 50:], k[:, :, 50:], v[:, :, 50:], 0.3)
    for part in ("_old_k", "_old_v"):
        assert torch.equal(getattr(at_once, part).decode(), getattr(streamed, part).decode())
    assert torch.equal(at_once._new_k.view, streamed._new_k.view)
    assert torch.equal(at_once._new_v.view, streamed._new_v.view)


def test_two_bits_really_take_two_bits():
    dims = Dims(layers=32, q_heads=32, kv_heads=8, head_dim=128, element_bytes=2)
    assert Kivi(bits=2).bytes_per_token(dims).device == 32 * 768
    assert Kivi(bits=4).bytes_per_token(dims).device == 32 * 1280
    x = rand(1, 8, 1280, 128)
    state = Kivi(bits=2).new_layer(0, LayerKV(x, x, x[:, :, :0], 0.1), rope=None)
    residual_of_values = 128 * 8 * 128 * 4
    assert state.nbytes().device == 1280 * 384 + (1280 - 128) * 384 + residual_of_values


@pytest.mark.parametrize(
    ("change", "says"),
    [({"bits": 3}, "2, 4 or 8"), ({"residual": 100}, "multiple of group"), ({"group": 0}, "at least")],
)
def test_settings_that_cannot_work_are_refused(change, says):
    with pytest.raises(SkvError, match=says):
        Kivi(**change)
    with pytest.raises(SkvError, match="does not divide this model's head size of 80"):
        Kivi().check(Dims(layers=1, q_heads=1, kv_heads=1, head_dim=80, element_bytes=2))
