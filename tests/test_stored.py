"""Tokens on the host: what comes back, and what they take."""

from __future__ import annotations

import pytest
import torch

from shadowkv.common.dims import Bytes
from shadowkv.tensors.stored import CODINGS, CodedTokens

# Half a step of the widest binade: int8 has 127 steps to its scale, e4m3 three bits of mantissa.
RELATIVE_TO_LARGEST = {"native": 0.0, "bf16": 2**-8, "int8": 0.51 / 127, "fp8": 0.51 / 14, "int4": 1.02 / 15}


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("coding", CODINGS)
def test_tokens_come_back_within_half_a_step(coding, head_dim):
    x = torch.randn(2, 3, 40, head_dim) * torch.logspace(-3, 4, 40)[:, None]
    held = CodedTokens(x[:, :, :30], coding)
    held.append(x[:, :, 30:])
    index = torch.randint(0, 40, (2, 3, 17))
    rows = x.gather(2, index[..., None].expand(-1, -1, -1, head_dim))
    bound = RELATIVE_TO_LARGEST[coding] * rows.abs().amax(dim=-1, keepdim=True)
    assert ((held.gather(index) - rows).abs() <= bound).all()
    everything = torch.arange(40).expand(2, 3, 40)
    assert torch.equal(held.fetch_all(x.device), held.gather(everything))


@pytest.mark.parametrize("coding", CODINGS)
def test_bytes_are_those_of_the_formula(coding):
    x = torch.randn(2, 3, 40, 64, dtype=torch.bfloat16)
    expected = 2 * 3 * 40 * CODINGS[coding].token_bytes(64, 2)
    assert CodedTokens(x, coding).nbytes() == Bytes(0, expected)
    assert CodedTokens(x, coding, offload=False).nbytes() == Bytes(expected, 0)


@pytest.mark.parametrize("coding", ["int8", "fp8", "int4"])
def test_tokens_are_coded_alone(coding):
    """A scale per token and head: a neighbour a thousand times larger changes nothing."""
    x = torch.randn(1, 2, 8, 32)
    loud = x.clone()
    loud[:, :, 3] *= 1000
    loud[:, 1] *= 7
    index = torch.tensor([[[0, 1, 2, 4, 5, 6, 7]]]).expand(1, 2, 7)
    left, right = CodedTokens(x, coding).gather(index), CodedTokens(loud, coding).gather(index)
    assert torch.equal(left[:, 0], right[:, 0])


@pytest.mark.parametrize("coding", CODINGS)
def test_zeros_and_huge_values_stay_finite(coding):
    x = torch.tensor([[0.0, 0.0], [3e30, -1.0], [1e-30, 1e-30]])[None, None]
    got = CodedTokens(x, coding).fetch_all(x.device)
    assert torch.isfinite(got).all()
    assert torch.equal(got[0, 0, 0], torch.zeros(2))


@pytest.mark.parametrize("coding", ["int8", "fp8"])
def test_tokens_of_next_to_nothing_are_not_taken_for_zeros(coding):
    """Below what a scale of fp16 times the largest code can say, the smallest scale serves."""
    x = torch.tensor([[1e-6, -5e-7], [0.0, 0.0]])[None, None]
    codes, scale = CODINGS[coding].encode(x)
    assert (scale > 0).all()
    got = CODINGS[coding].decode(codes, scale)
    assert (got - x).abs().max() <= 2.0**-24
    assert torch.equal(got[0, 0, 1], torch.zeros(2))
