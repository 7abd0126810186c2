"""Drawing tokens: the right frequencies, exact limits, and the same number draws the same token."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.engine.sampling import drawn, most_likely, nucleus, probabilities

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.25, 3.0, -torch.inf, 1.0])
GRID = 200_000


def shares(logits, temperature=1.0, top_p=1.0, count=GRID):
    """How often each token is drawn by numbers that are spread evenly."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = drawn(logits.expand(count, -1), uniform, temperature, top_p)
    return torch.bincount(tokens, minlength=len(logits)).double() / count


def by_transformers(logits, temperature, top_p):
    """What the warpers of transformers leave of these logits, as probabilities."""
    warped = TemperatureLogitsWarper(temperature)(None, logits[None])
    return (TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped).double().softmax(-1)[0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.2, 0.75, 0.97, 1.0])
def test_shares_are_those_of_the_usual_rule(temperature, top_p):
    expected = by_transformers(LOGITS, temperature, top_p)
    assert torch.allclose(shares(LOGITS, temperature, top_p), expected, atol=1.5 / GRID * len(LOGITS))
    assert not shares(LOGITS, temperature, top_p)[expected == 0].any()


def test_random_numbers_draw_at_the_right_frequencies():
    count = 20_000
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = drawn(LOGITS.expand(count, -1), uniform, 0.8, 0.95)
    expected = nucleus(probabilities(LOGITS[None], 0.8), 0.95)[0]
    seen, wanted = torch.bincount(tokens, minlength=len(LOGITS)), expected / expected.sum() * count
    assert not seen[wanted == 0].any()
    assert chisquare(seen[wanted > 0].numpy(), wanted[wanted > 0].numpy()).pvalue > 0.01
    flat = torch.full((int((wanted > 0).sum()),), count / int((wanted > 0).sum())).numpy()
    assert chisquare(seen[wanted > 0].numpy(), flat).pvalue < 1e-6, "the test sees another distribution"


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-320])
def test_a_temperature_near_0_is_the_greedy_choice(temperature):
    rows = torch.randn(50, 100, generator=torch.Generator().manual_seed(1)) * 1e4
    uniform = torch.linspace(0, 1 - 2**-53, 50, dtype=torch.float64)
    assert torch.equal(drawn(rows, uniform, temperature, 1.0), most_likely(rows))


def test_the_smallest_nucleus_is_one_token_and_of_equal_ones_the_lower_id():
    assert torch.equal(shares(LOGITS, top_p=1e-12).nonzero()[:, 0], torch.tensor([4]))
    ties = torch.zeros(4)
    assert shares(ties).tolist() == [0.25] * 4
    assert shares(ties, top_p=0.5).tolist() == [0.5, 0.5, 0, 0], "half is reached by two of four"
    assert shares(ties, top_p=0.51).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert shares(ties, top_p=1e-9).tolist() == [1, 0, 0, 0]
    assert shares(ties, temperature=1e-9).tolist() == [0.25] * 4, "no temperature tells equal tokens apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_every_type_are_drawn_from_in_fp64(dtype):
    logits = LOGITS.to(dtype)
    assert torch.equal(shares(logits, 0.7, 0.9), shares(logits.double(), 0.7, 0.9))


def test_the_ends_of_the_numbers_draw_tokens_that_have_probability():
    logits = torch.tensor([-torch.inf, 0.3, 0.1, -0.7, -torch.inf, -torch.inf])
    last = math.nextafter(1.0, 0.0)
    assert drawn(logits[None], torch.tensor([0.0]), 1.0, 1.0).tolist() == [1]
    assert drawn(logits[None], torch.tensor([last], dtype=torch.float64), 1.0, 1.0).tolist() == [3]
    many = torch.randn(200, 1000, generator=torch.Generator().manual_seed(2))
    many[:, 900:] = -torch.inf
    for top_p in (1.0, 0.9, 0.6, 0.2, 0.01):
        assert int(drawn(many, torch.full((200,), last, dtype=torch.float64), 1.3, top_p).max()) < 900
    assert int(drawn(torch.full((1, 5), torch.nan), torch.tensor([0.5]), 1.0, 0.9)) < 5, "the caller refuses it"


def test_a_row_is_drawn_alike_in_any_batch():
    rows = torch.randn(7, 300, generator=torch.Generator().manual_seed(3))
    uniform = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    alone = [int(drawn(row[None], u[None], 0.9, 0.8)) for row, u in zip(rows, uniform, strict=True)]
    assert drawn(rows, uniform, 0.9, 0.8).tolist() == alone


def test_close_rows_that_share_a_number_mostly_draw_the_same_token():
    """What makes common random numbers worth having; numbers of their own would agree in far fewer."""
    generator = torch.Generator().manual_seed(5)
    rows = 3 * torch.randn(2000, 50, generator=generator)
    near = rows + 0.02 * torch.randn(2000, 50, generator=generator)
    one, other = (torch.rand(2000, dtype=torch.float64, generator=generator) for _ in range(2))
    same = float((drawn(rows, one, 1.0, 0.95) == drawn(near, one, 1.0, 0.95)).double().mean())
    apart = float((drawn(rows, one, 1.0, 0.95) == drawn(near, other, 1.0, 0.95)).double().mean())
    assert same > 0.97
    assert apart < 0.6


def test_decode_draws_and_keeps_its_rules(tiny):
    engine, ids = Engine(tiny("llama")), torch.arange(5, 45)[None]
    prefill = engine.prefill(ids)

    def decode(choose=most_likely, method="full", **rules):
        return engine.decode(engine.replay(prefill, parse_method(method)), prefill.logits, 12, choose=choose, **rules)[
            0
        ]

    def numbers(seed):
        generator = torch.Generator().manual_seed(seed)
        return lambda logits: drawn(logits, torch.rand(1, dtype=torch.float64, generator=generator), 2.0, 0.99)

    assert decode(lambda logits: drawn(logits, torch.tensor([0.7]), 1e-9, 1.0)) == decode()
    free = decode(numbers(0))
    assert decode(numbers(0)) == free != decode(numbers(1))
    assert decode(numbers(0), "shadowkv:rank=32,budget=1024") == free, "lossless, so drawn alike"
    assert decode(numbers(0), stop_ids={free[3]}) == free[: free.index(free[3])]
    held = decode(numbers(0), stop_ids={free[0]}, min_new_tokens=4)
    assert len(held) >= 4
    assert free[0] not in held
