"""Calibrations: made from a text by a command, used by name, recorded by content."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import random_prompt, tiny_model

from cli.main import main
from evals.calibration.learning import LEARNERS, calibration_of, find_calibrated
from shadowkv.anatomy.rope import Rope
from shadowkv.common.errors import SkvError
from shadowkv.common.home import sha256_of
from shadowkv.contract.calibration import calibration_file, save_calibration
from shadowkv.contract.method import LayerKV
from shadowkv.contract.registry import methods, parse_method
from shadowkv.engine.engine import Engine
from shadowkv.methods.heads.duo import Duo
from shadowkv.methods.retrieval.infinigen import InfiniGen
from shadowkv.methods.retrieval.loki import Loki
from shadowkv.models.calibrated import check_weights


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
    layers = calibration_of(find_calibrated("infinigen"), model, random_prompt(300, seed=seed)).layers
    save_calibration(calibration_file("infinigen", name), layers, {"model": "tiny"})
    return layers


@pytest.mark.parametrize("family", ["llama", "llama-mha", "gemma3", "phi3-longrope"])
def test_every_layer_served_gets_a_rotation(family):
    model = tiny_model(family)
    layers = calibration_of(find_calibrated("infinigen"), model, random_prompt(200)).layers
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


# Loki


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "gemma3", "phi3-longrope"])
def test_components_are_orthonormal_and_of_one_kind(family):
    model = tiny_model(family)
    layers, about = calibration_of(find_calibrated("loki"), model, random_prompt(200))
    dims = Engine(model).dims
    assert tuple(layers) == dims.layer_ids
    for rows in layers.values():
        assert rows.shape == (dims.kv_heads, dims.head_dim, dims.head_dim)
        torch.testing.assert_close(rows @ rows.mT, torch.eye(dims.head_dim).expand_as(rows), rtol=0, atol=1e-4)
    assert about["components"].startswith(("of pre-RoPE keys", "of post-RoPE keys"))


def spelled_text(*, before_rope, tokens=240, dim=32):
    """A text whose keys have two directions, before RoPE or after, and whose queries ask for them."""
    rope = Rope(tiny_model("llama", head_dim=dim))
    made = torch.Generator().manual_seed(3)
    few = torch.randn(1, 2, tokens, 2, generator=made) @ torch.randn(2, dim, generator=made)
    q = torch.randn(1, 4, tokens, 2, generator=made) @ torch.randn(2, dim, generator=made)
    positions = torch.arange(tokens)
    k = rope.rotate(0, few, positions, tokens) if before_rope else few
    q = rope.rotate(0, q, positions, tokens) if before_rope else q
    return {0: LayerKV(k, k, q[:, :, -64:], dim**-0.5, q)}, rope


@pytest.mark.parametrize("before_rope", [True, False])
def test_the_kind_of_components_that_chooses_more_of_the_best_tokens_is_kept(before_rope):
    layers, rope = spelled_text(before_rope=before_rope)
    found, about = Loki.calibrate(layers, rope)
    shares = {kind: float(share) for kind, share in re.findall(r"(p\w+-RoPE) (\d\.\d+)", about["components"])}
    assert set(shares) == {"pre-RoPE", "post-RoPE"}
    assert about["components"].startswith(f"of {max(shares, key=shares.get)} keys")
    if not before_rope:
        keys = layers[0].k[0, 0]
        torch.testing.assert_close((keys @ found[0][0, :2].T).norm(), keys.norm(), rtol=1e-3, atol=1e-3)


def test_calibrated_components_rank_and_every_query_head_reads_its_own(home, tiny):
    """With the prompt's own components as a calibration, the same tokens as `basis=prompt`."""
    model = tiny("llama")
    engine, prompt = Engine(model), random_prompt(200)
    recorded = [layer.layer_kv(None, 0) for layer in engine.prefill(prompt).recording.recorded]
    own = {n: torch.linalg.svd(kv.k[0] - kv.k[0].mean(1, keepdim=True)).Vh for n, kv in enumerate(recorded)}
    save_calibration(calibration_file("loki", "own"), own, {"model": "tiny"})
    logits = [
        engine.extend(engine.replay(engine.prefill(prompt), Loki(budget=40, basis=basis)), torch.tensor([[7]]))
        for basis in ("own", "prompt")
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_a_models_own_calibration_is_asked_for_by_name_or_not_at_all():
    assert parse_method("loki") == Loki()
    assert Loki().on_calibration("tiny").label == "loki:basis=tiny"
    assert Loki().on_calibration(None).label == "loki:basis=prompt"
    assert Loki(basis="mine").on_calibration("tiny").label == "loki:basis=mine"
    assert parse_method("loki+minference").on_calibration("tiny").label == "loki:basis=tiny+minference"
    assert Loki().files() == Loki(basis="prompt").files() == {}
    with pytest.raises(SkvError, match="has to be named: basis=NAME"):
        Loki().new_state(None)


@pytest.mark.parametrize("method", [*LEARNERS, "duo"])
def test_what_can_be_calibrated_names_its_parameter(home, tiny, method):
    parameter = methods()[method].calibration
    assert parameter in methods()[method]().params()
    given = parse_method(f"{method}:{parameter}=given")
    assert given.files() == {parameter: home / "calibrations" / f"{method}-given.safetensors"}
    with pytest.raises(SkvError, match=f"no calibration 'given'; make it with: skv calibrate {method}"):
        given.check(Engine(tiny("llama")).dims)
    save_calibration(calibration_file(method, "given"), {0: torch.eye(3)[None]}, {"model": "another"})
    with pytest.raises(SkvError, match="another geometry"):
        parse_method(f"{method}:{parameter}=given").check(Engine(tiny("llama")).dims)


@pytest.fixture
def essays(text, monkeypatch):
    """The essays are there, and are this text."""
    monkeypatch.setattr("cli.shared.calibrations.DEFAULT_TEXT", str(text))
    monkeypatch.setattr("cli.shared.calibrations.TOKENS", {"loki": 300})


def test_a_run_makes_the_calibration_that_it_needs_once(home, essays, tiny_folder, tmp_path, capsys):
    argv = ["eval", "niah", "--model", str(tiny_folder), "--haystack", "synthetic", "--lengths", "512", "--depths", "1"]
    argv += ["-m", "full", "-m", "loki:budget=64", "--out", str(tmp_path / "run")]
    assert main([*argv, "--dry-run"]) == 0
    assert "loki:budget=64" in capsys.readouterr().out
    assert not list(home.rglob("*.safetensors")), "a dry run makes nothing"
    assert main(argv) == 0
    assert "skv: calibrated loki on 300 tokens of text.txt" in capsys.readouterr().err
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["methods"]
    assert len(recorded["loki:basis=tiny-llama,budget=64"]["basis.sha256"]) == 64
    assert main(argv) == 0
    assert "calibrated" not in capsys.readouterr().err


def test_without_a_text_a_set_goes_on_and_a_name_does_not(home, tiny_folder, tmp_path, capsys):
    argv = ["eval", "niah", "--model", str(tiny_folder), "--haystack", "synthetic", "--lengths", "512", "--depths", "1"]
    argv += ["--offline", "-q", "--out", str(tmp_path / "run")]
    assert main([*argv, "-m", "full", "-m", "loki"]) == 2
    assert "skv pull essays" in capsys.readouterr().err
    assert main([*argv, "-m", "@retrieval", "--budget", "128"]) == 1
    assert "unsupported: loki: " in capsys.readouterr().err


def test_random_weights_rank_by_the_prompt(home, tiny_folder, capsys):
    argv = ["bench", "throughput", "--model", "smollm2-135m", "--dummy", "-m", "loki", "--dry-run", "--json"]
    assert main(argv) == 0
    assert {row["method"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"loki:basis=prompt"}


def test_a_calibration_of_other_weights_is_refused(home, tiny_folder, tmp_path, capsys):
    """Equal geometry is not enough: what was learnt of one model says nothing of another."""
    for method, shape in {"duo": (2,), "infinigen": (2, 16, 16)}.items():
        about = {"model": "another", "weights_sha256": "0" * 64}
        save_calibration(calibration_file(method, "given"), {n: torch.rand(shape) for n in range(3)}, about)
        given = f"{method}:{methods()[method].calibration}=given"
        argv = ["eval", "niah", "--model", str(tiny_folder), "--haystack", "synthetic", "--lengths", "512"]
        assert main([*argv, "--depths", "1", "-m", given, "-q", "--out", str(tmp_path / method)]) == 2
        said = capsys.readouterr().err
        assert "was calibrated on other weights than these of" in said
        assert said.count("\n") == 1
        argv = ["bench", "latency", "--model", str(tiny_folder), "--context", "512", "--steps", "1", "-m", given]
        assert main([*argv, "-q", "--out", str(tmp_path / f"{method}-bench")]) == 2
        assert "was calibrated on other weights than these of" in capsys.readouterr().err


def test_a_calibration_that_does_not_say_what_it_was_made_on_is_taken(home, tiny):
    loaded = SimpleNamespace(weights_sha256="1" * 64, adapter=None, name="here")
    for about in ({}, {"weights_sha256": "unknown"}, {"weights_sha256": "1" * 64}):
        save_calibration(calibration_file("duo", "given"), {0: torch.rand(2)}, about)
        check_weights(Duo(heads="given"), loaded)
    adapted = SimpleNamespace(weights_sha256="1" * 64, adapter=SimpleNamespace(sha256="2" * 64), name="here")
    with pytest.raises(SkvError, match="other weights"):
        check_weights(Duo(heads="given"), adapted)
    check_weights(Duo(heads="given"), SimpleNamespace(weights_sha256=None, adapter=None, name="dummy"))


# DuoAttention


def test_gates_are_learnt_used_and_named_in_every_table(home, tiny_folder, text, tmp_path, capsys):
    argv = ["calibrate", "duo", "--model", str(tiny_folder), "--text", str(text), "--tokens", "2400"]
    assert main([*argv, "--name", "mine"]) == 0
    assert "-m duo:heads=mine" in capsys.readouterr().out
    path = home / "calibrations" / "duo-mine.safetensors"
    gates = load_file(path)
    assert gates.keys() == {"layer.0", "layer.1", "layer.2"}
    assert all(x.shape == (2,) and bool(((x >= 0) & (x <= 1)).all()) for x in gates.values())
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert {"text_sha256", "weights_sha256", "sinks", "recent", "texts", "steps", "lr", "penalty"} <= about.keys()
    table = tmp_path / "gates.tsv"
    table.write_text("0 1\n0.5 0.2\n0.9 0.4\n")
    out = tmp_path / "run"
    run = ["eval", "niah", "--model", str(tiny_folder), "--haystack", "synthetic", "--lengths", "600", "--depths", "1"]
    run += ["-q", "--out", str(out)]
    assert main([*run, "-m", "duo", "-m", "duo:heads=mine"]) == 0
    assert main([*run, "-m", f"duo:heads={table}"]) == 0
    says = [
        "duo: gates: judged on each prompt",
        f"duo:heads=mine: gates: calibration mine (sha256 {sha256_of(path)[:8]}...)",
        f"duo:heads={table}: gates: {table} (sha256 {sha256_of(table)[:8]}...)",
    ]
    notes = json.loads((out / "run.json").read_text())["notes"]
    assert sorted(note for note in notes if "gates" in note) == sorted(says)
    for file in ("summary.md", "summary.csv"):
        assert all(said in (out / file).read_text() for said in says), file


@pytest.mark.parametrize(
    ("tokens", "says"), [("1000", "leaves no room for 6 codes between 128 sinks and 256"), ("9999", "beyond this")]
)
def test_texts_without_room_for_codes_are_refused(home, tiny_folder, text, capsys, tokens, says):
    argv = ["calibrate", "duo", "--model", str(tiny_folder), "--text", str(text), "--tokens", tokens, "-q"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
