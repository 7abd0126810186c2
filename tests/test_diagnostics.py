"""Selection quality: nothing lost is no error and full recall; what is left out is what brute force says."""

from __future__ import annotations

import pytest
import torch
from test_methods import CASES
from tiny_models import random_prompt

from cli.main import main
from evals.runs.diagnostics import diagnose
from evals.runs.results import read_run
from shadowkv.contract.registry import methods, parse_method
from shadowkv.engine.engine import Engine


@pytest.fixture
def engine(tiny):
    return Engine(tiny("llama"), prefill_chunk_tokens=128, record_queries=True)


@pytest.mark.parametrize("name", methods())
def test_a_lossless_method_recalls_everything(engine, name):
    prefill = engine.prefill(random_prompt(300))
    method = methods()[name]().lossless(engine.dims, 320)
    found = diagnose(engine, prefill, method, 8, ())
    assert len(found.output_error) == len(found.recall) == engine.dims.layers
    assert max(found.output_error) < 1e-3
    assert all(recall is None or recall > 0.999 for recall in found.recall)


@pytest.mark.parametrize("spec", CASES)
def test_every_method_can_be_diagnosed_and_is_left_as_it_was(engine, spec):
    method, prefill = parse_method(spec), engine.prefill(random_prompt(300))
    before = engine.decode(engine.replay(prefill, method), prefill.logits, 8)
    found = diagnose(engine, prefill, method, 8, ())
    assert all(error >= 0 for error in found.output_error)
    assert all(recall is None or 0 <= recall <= 1 + 1e-5 for recall in found.recall)
    assert engine.decode(engine.replay(prefill, method), prefill.logits, 8) == before


def test_recall_is_the_mass_of_the_tokens_kept(engine):
    """StreamingLLM by hand: the mass of the first tokens and the newest, in every layer."""
    prompt = random_prompt(200)
    prefill = engine.prefill(prompt)
    found = diagnose(engine, prefill, parse_method("streaming:budget=40,sinks=4,rerotate=false"), 2, ())
    token = prefill.logits.argmax(dim=-1, keepdim=True)
    model = engine.model
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = model(torch.cat((prompt, token), dim=1), output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    for layer, recall in enumerate(found.recall):
        last = weights[layer][0, :, -1]
        # 40 tokens are held once the new one is in: 4 sinks and the newest 36.
        assert recall == pytest.approx(float((last[:, :4].sum(-1) + last[:, -36:].sum(-1)).mean()), abs=1e-4)


def test_a_run_shows_it(tiny_folder, tmp_path, capsys):
    argv = ["eval", "niah", "--model", str(tiny_folder), "-m", "full", "-m", "quest:budget=64", "--diagnostics"]
    argv += ["--lengths", "512", "--depths", "2", "--haystack", "synthetic", "--max-new-tokens", "4"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert "Selection quality" in capsys.readouterr().out
    assert (tmp_path / "run" / "plots" / "quality_by_layer.png").exists()
    for record in read_run(tmp_path / "run")[1]:
        assert len(record.meta["diagnostics"]["output_error"]) == 3
