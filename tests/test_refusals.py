"""What cannot be run is said before anything is computed, by every command alike; what overflows gives no score."""

from __future__ import annotations

import json
import re

import pytest
import torch
from families import family_model
from tiny_models import random_prompt, tiny_model
from transformers import AutoTokenizer

from cli.main import main
from shadowkv.common.errors import NotFiniteError
from shadowkv.engine.engine import Engine
from shadowkv.engine.finite import where_not_finite
from shadowkv.methods.full.method import Full

COMMANDS = {
    "run": ["eval", "niah", "--haystack", "synthetic", "--lengths", "512", "--depths", "1"],
    "dry run": ["eval", "niah", "--haystack", "synthetic", "--lengths", "512", "--depths", "1", "--dry-run"],
    "plan": ["plan", "--gpu", "h200", "--context", "512"],
    "sweep": ["bench", "throughput", "--haystack", "synthetic", "--context", "256", "--dry-run"],
}
REFUSED = {
    "diffllama": "attends (to other keys and values than it keeps|by code of its own)",
    "gemma2": "attention sinks or logit soft-capping",
    "gpt_oss": "attention sinks or logit soft-capping",
    "jetmoe": "attends by code of its own",
    "doge": "adds a mask of its own",
    "bloom": "declares no longest sequence",
    "mpt": "declares no longest sequence",
    "mamba": "declares no longest sequence",
    "rwkv": "keeps no keys and values",
    "deepseek_v3": r"latent attention \(MLA\)",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_be_driven_is_refused_by_every_command_alike(family, tmp_path, tiny_folder, capsys):
    folder = tmp_path / family
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    # A config of theirs holds no such field; the others need theirs.
    without = {"max_position_embeddings": None} if REFUSED[family] == "declares no longest sequence" else {}
    family_model(family, vocab_size=300, **without).save_pretrained(folder)
    said = {}
    for name, argv in COMMANDS.items():
        out = [] if name == "plan" else ["--out", str(tmp_path / "run")]
        assert main([*argv, "--model", str(folder), "-m", "full", *out]) == 2
        said[name] = capsys.readouterr().err
    assert re.search(REFUSED[family], said["run"])
    assert set(said.values()) == {said["run"]}
    assert said["run"].count("\n") == 1
    assert not (tmp_path / "run").exists()


def overflowing(tmp_path, tiny_folder):
    """A folder with a model whose second layer overflows half precision, and nothing wider."""
    folder = tmp_path / "loud"
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.model.layers[1].mlp.down_proj.weight.mul_(3000)
    model.model.layers[1].mlp.up_proj.weight.mul_(300)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_answer_of_numbers_that_overflow_is_unscored(tmp_path, tiny_folder, capsys):
    folder = overflowing(tmp_path, tiny_folder)
    argv = [*COMMANDS["run"], "--model", str(folder), "-m", "full", "-m", "quest:budget=64", "--max-new-tokens", "2"]
    assert main([*argv, "--dtype", "float16", "--out", str(tmp_path / "half")]) == 1
    said = capsys.readouterr()
    assert (
        "not finite in float16 at step 0 of the answer, first in layer 1; try --dtype bfloat16 or float32" in said.err
    )
    assert "the self-check found this model's own numbers not finite" in said.out
    records = [json.loads(line) for line in (tmp_path / "half" / "samples.jsonl").read_text().splitlines()]
    assert [(record["status"], record["score"]) for record in records] == [("error", None)] * 2
    assert main([*argv, "--out", str(tmp_path / "single")]) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_token_is_chosen_from_logits_that_are_not_finite(tiny, value):
    engine = Engine(tiny("llama"))
    prefill = engine.prefill(random_prompt(50))
    logits = prefill.logits.clone()
    logits[0, 7] = value
    with pytest.raises(NotFiniteError, match=r"not finite in float32 at step 0 of the answer$"):
        engine.decode(engine.replay(prefill, Full()), logits, 4)


def test_where_numbers_overflow_is_found():
    ids = random_prompt(50)
    model = tiny_model("llama")
    engine = Engine(model)
    head = where_not_finite(engine, ids, NotFiniteError("float32", []))
    assert "first in the output head" in str(head)
    late = where_not_finite(engine, ids, NotFiniteError("float32", [1, 2]))
    assert "at step 2 of the answer, first in the method" in str(late)
    model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    assert "first in layer 2" in str(where_not_finite(engine, ids, NotFiniteError("float32", [])))
    assert not any(layer._forward_hooks for layer in model.model.layers)
