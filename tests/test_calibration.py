"""Calibrations: made from a text by a command, used by name, recorded by content."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_prompt, tiny_model

from cli.main import main
from evals.calibrating import calibration_of, find_calibrated
from shadowkv.calibration import calibration_file, save_calibration
from shadowkv.engine import Engine
from shadowkv.errors import SkvError
from shadowkv.methods.infinigen import InfiniGen


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The tide came in slowly over the grey stones of the harbour. " * 40)
    return path


def calibrated(model, name="given", seed=9):
    layers = calibration_of(find_calibrated("infinigen"), model, random_prompt(300, seed=seed))
    save_calibration(calibration_file("infinigen", name), layers, {"model": "tiny"})
    return layers


@pytest.mark.parametrize("family", ["llama", "llama-mha", "gemma3", "phi3-longrope"])
def test_every_layer_served_gets_a_rotation(family):
    model = tiny_model(family)
    layers = calibration_of(find_calibrated("infinigen"), model, random_prompt(200))
    engine = Engine(model)
    assert tuple(layers) == engine.dims.layer_ids
    for turned in layers.values():
        assert turned.shape == (engine.dims.kv_heads, engine.dims.head_dim, engine.dims.head_dim)
        torch.testing.assert_close(turned.mT @ turned, torch.eye(turned.shape[-1]).expand_as(turned), rtol=0, atol=1e-5)


def test_a_calibrated_skew_is_used_and_read_back(home, tiny):
    model = tiny("llama")
    layers = calibrated(model)
    method = InfiniGen(skew="given", budget=40, dense_layers=1)
    assert {n: x.tolist() for n, x in method.rotations.items()} == {n: x.tolist() for n, x in layers.items()}
    engine = Engine(model)
    cache = engine.replay(engine.prefill(random_prompt(200)), method)
    kept = cache._shares[0].cache._guessed[1][0]._skews
    for head in range(engine.dims.kv_heads):
        for column in kept[head].T:
            assert (layers[1][head].T - column).abs().amax(dim=1).min() < 1e-6, "columns are the calibration's"


def test_with_all_channels_the_calibration_does_not_matter(home, tiny):
    """A rotation changes no score, so which one it is shows only in the channels left out."""
    model = tiny("llama")
    calibrated(model)
    everything = {"budget": 60, "alpha": math.inf, "ratio": 1.0, "dense_layers": 1}
    engine, prompt = Engine(model), random_prompt(200)
    own, given = (engine.generate(prompt, InfiniGen(**everything, skew=skew), 24) for skew in (None, "given"))
    assert own == given


def test_what_cannot_be_used_is_refused(home, tiny, tmp_path):
    dims = Engine(tiny("llama")).dims
    with pytest.raises(SkvError, match="no calibration 'mine'; make it with: skv calibrate infinigen"):
        InfiniGen(skew="mine").check(dims)
    calibrated(tiny("llama-mha"))
    with pytest.raises(SkvError, match="another geometry"):
        InfiniGen(skew="given").check(dims)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    with pytest.raises(SkvError, match="is not a calibration"):
        InfiniGen(skew=str(broken)).check(dims)
    few = tmp_path / "few.safetensors"
    save_file({"layer.0": torch.eye(16).expand(2, 16, 16).contiguous()}, few)
    with pytest.raises(SkvError, match="another geometry"):
        InfiniGen(skew=str(few), dense_layers=1).check(dims)


def test_the_command_makes_what_the_method_takes(home, tiny_folder, text, tmp_path, capsys):
    argv = ["calibrate", "infinigen", "--model", str(tiny_folder), "--text", str(text), "--tokens", "300"]
    assert main([*argv, "--name", "mine"]) == 0
    assert "-m infinigen:skew=mine" in capsys.readouterr().out
    assert load_file(home / "calibrations" / "infinigen-mine.safetensors").keys() == {"layer.0", "layer.1", "layer.2"}
    out = tmp_path / "run"
    run = ["eval", "niah", "--model", str(tiny_folder), "--haystack", "synthetic", "--lengths", "512", "--depths", "1"]
    run += ["-m", "infinigen:skew=mine,budget=64", "-q", "--out", str(out)]
    assert main(run) == 0
    recorded = json.loads((out / "run.json").read_text())["methods"]["infinigen:budget=64,skew=mine"]
    assert len(recorded["skew.sha256"]) == 64
    # The same name with other contents is another setting: the folder must not mix them.
    assert main([*argv[:-1], "400", "--name", "mine", "-q"]) == 0
    assert main(run) == 2
    assert "parameters of infinigen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tokens", "4000"], "calibration text text.txt is too short: "),
        (["--tokens", "10"], "--tokens must be at least 256, got 10"),
        (["--tokens", "999999"], "beyond this model's context of 4096"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_texts_that_do_not_do_are_refused(home, tiny_folder, text, capsys, more, says):
    argv = ["calibrate", "infinigen", "--model", str(tiny_folder), "--text", str(text), *more]
    assert main(argv) == 2
    assert says in capsys.readouterr().err
    assert not list(home.rglob("*.safetensors"))


def test_methods_that_learn_nothing_say_so(capsys):
    assert main(["calibrate", "infinigne", "--model", "smollm2-135m"]) == 2
    assert "needs no calibration (did you mean 'infinigen'?)" in capsys.readouterr().err
