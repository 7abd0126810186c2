"""Token ids that a model has no embedding for: a tokenizer of a larger model, said in one line."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_models import VOCAB, random_prompt, tiny_model

from cli.main import main
from evals.runs.results import read_run
from shadowkv.common.errors import SkvError
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full


@pytest.mark.parametrize("token", [VOCAB, VOCAB + 1000])
def test_prompts_and_later_turns_are_refused_by_id(tiny, token):
    engine, prompt = Engine(tiny("llama")), random_prompt(300)
    cache = engine.replay(engine.prefill(prompt), Full())
    says = f"token id {token}, and this model's embedding has {VOCAB}"
    with pytest.raises(SkvError, match=says):
        engine.extend(cache, torch.tensor([[5, token]]))
    assert engine.extend(cache, torch.tensor([[5]])).shape == (1, VOCAB), "nothing was fed"
    bad = torch.cat((prompt, torch.tensor([[token]])), dim=1)
    for compute in (engine.prefill, engine.stream):
        with pytest.raises(SkvError, match=says):
            compute(bad)


def test_an_end_that_the_model_does_not_know_is_never_chosen(tiny):
    engine = Engine(tiny("llama"))
    prefill = engine.prefill(random_prompt(300))
    cache = engine.replay(prefill, Full())
    assert len(engine.decode(cache, prefill.logits, 4, stop_ids=(VOCAB + 7,), min_new_tokens=2)[0]) == 4


def test_answers_to_such_prompts_are_unscored(tiny_folder, tmp_path, capsys):
    folder = tmp_path / "small"
    shutil.copytree(tiny_folder, folder)
    tiny_model("llama", vocab_size=90).save_pretrained(folder)
    words = ["--lengths", "512", "--depths", "1", "--haystack", "synthetic", "-m", "full", "-m", "quest:budget=64"]
    for more in ([], ["--stream"]):
        out = tmp_path / f"run{len(more)}"
        assert main(["eval", "niah", "--model", str(folder), *words, "--out", str(out), *more]) == 1
        assert "skv: unscored: full @ 512" in capsys.readouterr().err
        for record in read_run(out)[1]:
            assert (record.score, record.status) == (None, "error")
            assert "and this model's embedding has 90" in record.error
