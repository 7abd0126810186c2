"""Un-rotating a model's own keys gives what its key projection made, for every family."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, random_prompt

from shadowkv.anatomy.rope import Rope
from shadowkv.anatomy.rotary_table import Pairing
from shadowkv.engine.engine import Engine


def pre_rope_keys(model, ids):
    """Per layer, the keys that enter `apply_rotary_pos_emb`, seen by calling the model through a spy."""
    import sys

    engine = Engine(model, prefill_chunk_tokens=4096)
    module = sys.modules[type(model.get_decoder()).__module__]
    original, seen = module.apply_rotary_pos_emb, []

    def spy(q, k, cos, sin, *args, **kwargs):
        seen.append(k.clone())
        return original(q, k, cos, sin, *args, **kwargs)

    module.apply_rotary_pos_emb = spy
    try:
        prefill = engine.prefill(ids)
    finally:
        module.apply_rotary_pos_emb = original
    return seen, prefill


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [100, 300])
def test_unrotate_inverts_what_the_model_did(tiny, family, tokens):
    model = tiny(family)
    expected, prefill = pre_rope_keys(model, random_prompt(tokens))
    rope, positions = Rope(model), torch.arange(tokens)
    for layer, (recorded, k_pre) in enumerate(zip(prefill.recording.recorded, expected, strict=True)):
        k = recorded.layer_kv(None, 0).k
        back = rope.unrotate(layer, k, positions, tokens)
        assert ((back - k_pre).norm() / k_pre.norm()).item() < 1e-6
        again = rope.rotate(layer, back, positions, tokens)
        assert ((again - k).norm() / k.norm()).item() < 1e-6


def test_rotate_takes_a_position_per_head_and_token(tiny):
    rope = Rope(tiny("llama"))
    k = torch.randn(1, 2, 5, 16)
    positions = torch.tensor([[[3, 9, 100, 7, 0], [1, 1, 2, 50, 4]]])
    together = rope.rotate(0, k, positions, 200)
    for head in range(2):
        alone = rope.rotate(0, k[:, head : head + 1], positions[0, head], 200)
        assert torch.equal(together[:, head : head + 1], alone)


def test_tables_do_not_disturb_the_model(tiny):
    model, ids = tiny("phi3-longrope"), random_prompt(100)
    before = Engine(model).prefill(ids).logits
    Rope(model).rotate(0, torch.randn(1, 2, 3, 16), torch.tensor([1, 2, 3]), 1000)
    assert torch.equal(before, Engine(model).prefill(ids).logits)


def _way(pair, partner, turned):
    sign = torch.tensor([1.0] * turned + [0.0] * (len(pair) - turned))
    return Pairing.of(torch.tensor(pair).int(), torch.tensor(partner).int(), sign)


@pytest.mark.parametrize(
    ("pair", "partner", "turned", "pairing"),
    [
        ([0, 1, 0, 1], [2, 3, 0, 1], 4, (2, False)),
        ([0, 0, 1, 1], [1, 0, 3, 2], 4, (2, True)),
        ([0, 1, 0, 1, 0, 0], [2, 3, 0, 1, 4, 5], 4, (2, False)),
        ([0, 0, 1, 1, 0, 0], [1, 0, 3, 2, 4, 5], 4, (2, True)),
        ([0, 0, 0, 0], [1, 0, 2, 3], 2, (1, False)),  # one pair is both
        ([0, 0, 0, 0], [0, 1, 2, 3], 0, (0, False)),
        ([0, 1, 1, 0], [3, 2, 1, 0], 4, None),
        ([1, 0, 1, 0], [2, 3, 0, 1], 4, None),  # angles in another order
        ([0, 1, 0, 1], [1, 0, 3, 2], 4, None),
    ],
)
def test_where_the_channels_of_pairs_lie_is_read_off_a_table(pair, partner, turned, pairing):
    assert _way(pair, partner, turned) == pairing


def test_channels_that_are_turned_behind_others_that_are_not_lie_in_no_usual_way():
    pair, partner = torch.tensor([0, 0, 0, 1, 0, 1]).int(), torch.tensor([0, 1, 4, 5, 2, 3]).int()
    assert Pairing.of(pair, partner, torch.tensor([0.0, 0, -1, -1, 1, 1])) is None
