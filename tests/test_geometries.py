"""Every method on models without groups, with groups of 3 and 4, and with heads of 64 to 256."""

from __future__ import annotations

import pytest
import torch
from test_methods import SMALL
from tiny_models import geometry_model, random_prompt

from shadowkv.contract.registry import methods, parse_method
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full

GEOMETRIES = [(1, 64), (3, 96), (4, 128), (3, 256)]  # query heads per KV head, head size


@pytest.mark.parametrize(("group", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("name", methods())
def test_every_method_serves_every_geometry(name, group, head_dim):
    """Exactly where it claims to be exact, and otherwise with something left out."""
    engine = Engine(geometry_model(group, head_dim), prefill_chunk_tokens=64, record_queries=True)
    prefill, turn = engine.prefill(random_prompt(150)), random_prompt(20, seed=1)
    expected = engine.extend(engine.replay(prefill, Full()), turn)
    lossless = methods()[name]().lossless(engine.dims, 170)
    if lossless is not None:
        got = engine.extend(engine.replay(prefill, lossless), turn)
        assert ((got - expected).norm() / expected.norm()).item() < 1e-4
    small = parse_method(SMALL.get(name, [name])[0])
    logits = engine.extend(engine.replay(prefill, small), turn)
    assert torch.isfinite(logits).all()
    if name != "full":
        assert not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
