"""Two engines of one method: how one is chosen, and that both answer alike for a user."""

from __future__ import annotations

import json

import pytest
from tiny_models import random_prompt
from typer.testing import CliRunner

from cli.main import app
from shadowkv.common.errors import SkvError
from shadowkv.contract.engines import means_fast, uses_fast
from shadowkv.contract.registry import methods, parse_method
from shadowkv.engine.engine import Engine
from shadowkv.kernels.operations import operations
from shadowkv.methods.full.method import Full
from shadowkv.tensors.host_memory import require_host_bytes


@pytest.mark.parametrize(
    ("engine", "device", "fast"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("fast", "cpu", True), ("reference", "cuda", False)],
)
def test_auto_is_fast_on_a_gpu(engine, device, fast):
    assert means_fast(engine, device) == fast


def test_auto_does_without_triton(monkeypatch):
    monkeypatch.setattr("shadowkv.contract.engines.has_triton", lambda: False)
    assert not uses_fast("auto", "cuda")
    assert uses_fast("fast", "cuda")  # asked for by name: an error will say what to install


def test_auto_does_not_hold_a_prompt_twice():
    assert uses_fast("auto", "cuda")
    assert not uses_fast("auto", "cuda", copied=True)
    assert uses_fast("fast", "cuda", copied=True)  # asked for by name


@pytest.mark.parametrize("shared", [True, False])
def test_methods_are_told_whether_the_prompt_stays(tiny, monkeypatch, shared):
    engine, told = Engine(tiny("llama")), []
    real = Full.new_layer
    monkeypatch.setattr(
        Full, "new_layer", lambda self, layer, kv, rope: told.append(kv.shared) or real(self, layer, kv, rope)
    )
    prefill = engine.prefill(random_prompt(40))
    engine.replay(prefill, Full()) if shared else engine.adopt(prefill.recording, Full())
    assert told == [shared] * 3


def test_kernels_without_triton_are_an_error_of_one_line(monkeypatch):
    import torch

    monkeypatch.setattr("shadowkv.kernels.operations.has_triton", lambda: False)
    with pytest.raises(SkvError, match=r"pip install 'skv\[gpu\]'"):
        operations(torch.device("cuda"))


@pytest.mark.parametrize("name", [n for n in methods() if "engine" in methods()[n]().params()])
def test_unknown_engines_are_refused(name):
    with pytest.raises(SkvError, match="did you mean 'fast'"):
        parse_method(f"{name}:engine=fats")


def test_an_engine_for_all_leaves_alone_what_has_none():
    assert parse_method("loki").with_engine("fast") == parse_method("loki")
    assert parse_method("shadowkv+minference").with_engine("fast").label == "shadowkv:engine=fast+minference"


def test_a_host_that_is_too_small_is_said_before_anything_is_taken(monkeypatch):
    monkeypatch.setattr("shadowkv.tensors.host_memory.available_host_bytes", lambda: 2**30)
    require_host_bytes(2**29, "a small one")
    with pytest.raises(SkvError, match=r"shadowkv .* would keep 7\.6 GiB .* 1\.0 of [0-9.]+ GiB are free"):
        require_host_bytes(int(7.625 * 2**30), "shadowkv of 124928 tokens")


def answers(model, out, engine, *options):
    """Predictions by prompt and method, and the methods' labels."""
    command = ["eval", "niah", "--model", str(model), "--haystack", "synthetic", "--engine", engine, "--quiet"]
    run = CliRunner().invoke(app, [*command, *options, "--out", str(out)])
    assert run.exit_code == 0, run.output
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    found = {(r["method"].split(":")[0], r["sample"], r["task"]): r["prediction"] for r in records}
    return found, {r["method"] for r in records}


def test_both_engines_answer_alike_on_the_command_line(tiny_folder, tmp_path):
    asked = ["--lengths", "512", "--depths", "2", "-m", "full", "-m", "shadowkv:rank=12,budget=64,outliers=2"]
    reference, _ = answers(tiny_folder, tmp_path / "reference", "reference", *asked)
    fast, labels = answers(tiny_folder, tmp_path / "fast", "fast", *asked)
    assert fast == reference
    assert labels == {"full:engine=fast", "shadowkv:budget=64,engine=fast,outliers=2,rank=12"}


@pytest.mark.usefixtures("interpreter")
def test_kernels_answer_as_the_reference_does_on_the_command_line(tiny_folder, tmp_path):
    asked = ["--lengths", "400", "--depths", "1", "-m", "shadowkv:rank=12,budget=32,outliers=1,local=1"]
    reference, _ = answers(tiny_folder, tmp_path / "reference", "reference", *asked)
    fast, _ = answers(tiny_folder, tmp_path / "fast", "fast", *asked)
    assert fast == reference
