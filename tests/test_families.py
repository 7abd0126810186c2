"""Exact or refused, for every decoder family of transformers: never another model's tokens, never a traceback."""

from __future__ import annotations

import inspect
from contextlib import suppress

import pytest
import torch
import transformers
from families import DOCUMENT, FAMILIES, VOCAB, family_model, judge, known, own_tokens, row

from shadowkv.anatomy.rotary_table import rotary_table
from shadowkv.anatomy.survey import CannotRunError
from shadowkv.common.errors import SkvError
from shadowkv.common.wording import plain_line
from shadowkv.engine.engine import Engine
from shadowkv.engine.self_check import self_check
from shadowkv.models.model_size import model_size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exact_under_every_method_or_refused(family):
    if not known(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    model = family_model(family)
    verdict = judge(model)
    assert verdict.wrong == []
    assert all(reason == plain_line(reason) for reason in verdict.refused.values())
    table = DOCUMENT.read_text(encoding="utf-8")
    as_written = f"transformers {transformers.__version__}," in table
    if as_written:
        assert row(family, verdict) in table.splitlines(), "python tests/families.py writes the table anew"
    if "" in verdict.refused:
        # What is known without weights is said by plans and dry runs too; of older versions it is not always known.
        with pytest.raises(SkvError) if as_written else suppress(SkvError):
            model_size(model.config, 4)
        return
    assert {"full", "quest", "snapkv", "kivi"} <= set(verdict.exact)
    size, engine = model_size(model.config, 4, device="cpu"), Engine(model)
    both = size.layers, engine.layers
    shapes = [{(layer.q_heads, layer.kv_heads, layer.head_dim, layer.window) for layer in made} for made in both]
    assert shapes[0] == shapes[1]
    if as_written:  # older ones cannot run all of them without weights
        assert size.layers == engine.layers
        assert size.dims == engine.dims or not engine.dims.rotary
    elif family == "gemma3n_text":
        pytest.skip("older versions compute other keys in its last layers when they are given no cache")
    found = self_check(model)
    assert found.layer_error < 1e-5
    assert found.logit_error < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_unrotated_keys_of_one_token_are_the_same_everywhere(family):
    """What lossless settings cannot show: un-rotating leaves nothing of the position, in any layer that is served."""
    if not known(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    try:
        engine = Engine(family_model(family), prefill_chunk_tokens=80)
    except SkvError:
        pytest.skip("refused")
    if not engine.dims.rotary:
        pytest.skip("no method un-rotates its keys")
    tokens = 200
    recorded = engine.prefill(torch.full((1, tokens), VOCAB // 2)).recording.recorded
    for layer in engine.dims.layer_ids:
        keys = recorded[layer].layer_kv(None, 0).k
        positions = torch.arange(tokens)
        still = engine.rope.unrotate(layer, keys, positions, tokens)
        assert (still - still[:, :, :1]).norm() < 1e-3 * still.norm()
        again = engine.rope.rotate(layer, still, positions, tokens)
        assert (again - keys).norm() < 1e-5 * keys.norm()


@pytest.mark.parametrize(
    ("family", "neighbours"),
    [
        ("llama", False),
        ("hunyuan_v1_dense", False),
        ("smollm3", False),
        ("phi", False),
        ("cohere", True),
        ("llama4_text", True),
        ("gemma3_text", False),
    ],
)
def test_rotary_tables_turn_keys_as_the_model_does(family, neighbours):
    """Those that the fast engine reads, in every layer that is served."""
    engine = Engine(family_model(family))
    keys, tokens = torch.randn(2, 1, 50, engine.dims.head_dim), 50
    for layer in engine.dims.layer_ids:
        table = rotary_table(engine.rope, layer, engine.dims.head_dim, tokens, tokens, keys)
        positions = torch.arange(tokens)
        expected = engine.rope.rotate(layer, keys, positions, tokens)
        torch.testing.assert_close(table.rotate(keys, positions.expand(2, 1, tokens)), expected, rtol=1e-4, atol=1e-4)
        # And say where pairs lie, so that kernels need not read that.
        assert table.pairing is not None
        assert table.pairing.pairs == int((table.sign != 0).sum()) // 2
        assert table.pairing.neighbours == (neighbours and table.pairing.pairs > 0)


def test_a_model_that_cannot_be_run_without_weights_is_not_refused_for_that(monkeypatch):
    """Nor if a sample of it fails with any cache: its config is believed until it is loaded."""

    def fails(model):
        raise CannotRunError("its own code fails here")

    config = family_model("gemma3_text").config
    expected = model_size(config, 4).layers
    monkeypatch.setattr("shadowkv.anatomy.survey.survey", fails)
    with pytest.raises(CannotRunError):
        model_size(config, 4)
    monkeypatch.setattr("shadowkv.models.model_size._runs", lambda model: False)
    assert model_size(config, 4).layers == expected


def test_enough_families_are_looked_at():
    assert len(FAMILIES) >= 60
    assert sum("| exact |" in line for line in DOCUMENT.read_text(encoding="utf-8").splitlines()) >= 60


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_parameters_by_kind_of_layer_are_those_of_each(kind):
    """Frequencies that change with the length, given for one kind of layer: followed, or refused where none can."""
    rotary = {
        "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "longrope": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 256,
            "factor": 8.0,
        },
    }
    usual = {"rope_type": "default", "rope_theta": 10000.0}
    given = {"full_attention": rotary[kind], "sliding_attention": usual}
    model = family_model("olmo3", rope_parameters=given, max_position_embeddings=256 if kind == "dynamic" else 2048)
    if "layer_type" not in inspect.signature(model.model.rotary_emb.forward).parameters:
        pytest.skip(f"transformers {transformers.__version__} gives all layers of this model the same")
    short, long = (torch.randint(3, VOCAB, (1, n), generator=torch.Generator().manual_seed(2)) for n in (200, 300))
    engine = Engine(model, prefill_chunk_tokens=64)
    from shadowkv.methods.full.method import Full

    assert engine.generate(short, Full(), 8)[0] == own_tokens(model, short, 8)
    if kind == "dynamic":
        with pytest.raises(SkvError, match="drift with every token"):
            engine.generate(long, Full(), 8)
        return
    assert engine.generate(long, Full(), 8)[0] == own_tokens(model, long, 8)
    with pytest.raises(SkvError, match="crosses that point"):
        engine.generate(short, Full(), 100)
