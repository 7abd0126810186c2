"""A model that does not run through skv's caches as it is, is refused before anything is scored."""

from __future__ import annotations

import json

import pytest
import torch
from families import family_model

from cli.main import main
from shadowkv.anatomy.attention import attach
from shadowkv.anatomy.forward import cache_argument
from shadowkv.anatomy.survey import survey
from shadowkv.common.errors import SkvError
from shadowkv.engine import self_check as module
from shadowkv.engine.engine import Engine
from shadowkv.engine.self_check import remembered, self_check
from shadowkv.methods.full.method import Full
from shadowkv.methods.shadowkv.method import ShadowKV

BROKEN = 2  # layer


def broken(model, change):
    """`model` with what one layer's attention is called with changed by `change(kwargs, has_cache)`."""
    attention = model.model.layers[BROKEN].self_attn
    original, name = attention.forward, cache_argument(type(attention).forward)

    def forward(**kwargs):
        change(kwargs, kwargs.get(name) is not None)
        return original(**kwargs)

    attention.forward = forward
    return model


def turned_twice(kwargs, has_cache):
    cos, sin = kwargs["position_embeddings"]
    kwargs["position_embeddings"] = (cos.square() - sin.square(), 2 * sin * cos)


def only_with_a_cache(change):
    return lambda kwargs, has_cache: change(kwargs, has_cache) if has_cache else None


def louder(kwargs, has_cache):
    kwargs["hidden_states"] = kwargs["hidden_states"] * 1.01


def while_decoding(change):
    def only(kwargs, has_cache):
        if kwargs["hidden_states"].shape[1] == 1:
            change(kwargs, has_cache)

    return only


@pytest.mark.parametrize(
    "change",
    [only_with_a_cache(turned_twice), only_with_a_cache(louder), while_decoding(turned_twice), while_decoding(louder)],
    ids=["turns twice", "1 % louder", "turns twice while decoding", "1 % louder while decoding"],
)
def test_a_layer_that_is_another_with_a_cache_is_named(change):
    model = family_model("llama")
    assert self_check(model).layer_error < 1e-5
    with pytest.raises(SkvError, match=rf"layer {BROKEN} differs from the model's own by [\d.]+%"):
        self_check(broken(model, change))


def test_what_lies_between_layers_is_seen_in_the_logits():
    model = family_model("llama")
    norm, original = model.model.norm, model.model.norm.forward
    norm.forward = lambda x: original(x) * (1 + 0.1 * (x.shape[1] == 1)) + 0.1 * (x.shape[1] == 1)
    with pytest.raises(SkvError, match="its logits differ from the model's own by"):
        self_check(model)


def test_a_layer_that_always_turns_twice_is_not_unrotated():
    """That is the model's own way, and full attention follows; what un-rotates keys would be wrong, and is refused."""
    model = broken(family_model("llama"), turned_twice)
    assert self_check(model).layer_error < 1e-5
    engine = Engine(model)
    assert not engine.dims.rotary
    Full().check(engine.dims)
    with pytest.raises(SkvError, match="does not know how this model turns them"):
        ShadowKV(rank=8).check(engine.dims)


def test_a_model_that_attends_by_itself_is_refused_by_the_survey():
    model = family_model("llama")
    attention = model.model.layers[BROKEN].self_attn

    def by_itself(hidden_states, **kwargs):
        kwargs[cache_argument(type(attention).forward)].update(*[hidden_states[:, None, :, :32]] * 2, BROKEN)
        return hidden_states, None

    attention.forward = by_itself
    with pytest.raises(SkvError, match="attends by code of its own"):
        survey(model)


def test_nothing_is_left_of_a_check():
    model = family_model("gemma3_text")
    attach(model)
    self_check(model)
    assert model.config._attn_implementation == "skv"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_windows_are_checked_beyond_their_end():
    assert self_check(family_model("gemma3_text", sliding_window=200)).tokens > 200


def test_numbers_that_overflow_are_left_to_the_answers():
    model = family_model("llama").half()
    model.model.layers[1].mlp.down_proj.weight.mul_(1e4)
    model.model.layers[1].mlp.up_proj.weight.mul_(1e3)
    assert self_check(model).layer_error is None


def test_half_precision_passes_with_its_own_tolerance():
    for dtype in (torch.bfloat16, torch.float16):
        found = self_check(family_model("llama").to(dtype))
        assert 1e-5 < found.layer_error < found.tolerance


def test_a_model_that_passed_is_not_asked_again(monkeypatch, tmp_path):
    monkeypatch.setenv("SKV_HOME", str(tmp_path))
    asked = []

    def counted(model):
        asked.append(model)
        return self_check(model)

    monkeypatch.setattr(module, "self_check", counted)
    model = family_model("llama")
    first = remembered(model, "a" * 64)
    assert remembered(model, "a" * 64) == first
    assert len(asked) == 1
    remembered(model, "b" * 64)
    remembered(model, None)
    remembered(model, None)
    assert len(asked) == 4, "other weights, and weights that nobody knows"
    (kept,) = [path for path in (tmp_path / "self-checks").iterdir() if json.loads(path.read_text())][:1]
    for path in (tmp_path / "self-checks").iterdir():
        path.write_text(kept.read_text()[:10])
    assert remembered(model, "a" * 64) == first
    assert len(asked) == 5, "a file that was cut off"


def test_the_command_line_refuses_and_notes(monkeypatch, tmp_path, tiny_folder, capsys):
    monkeypatch.setenv("SKV_HOME", str(tmp_path / "home"))
    argv = ["eval", "niah", "--model", str(tiny_folder), "-m", "full", "--haystack", "synthetic", "--lengths", "512"]
    argv += ["--depths", "1", "--max-new-tokens", "2"]
    assert main([*argv, "--out", str(tmp_path / "checked")]) == 0
    session = json.loads((tmp_path / "checked" / "run.json").read_text())["sessions"][0]
    assert session["self_check"]["layer_error"] < 1e-5
    capsys.readouterr()

    def refuse(model):
        raise SkvError("LlamaForCausalLM is not what runs through skv's caches: layer 1 differs")

    monkeypatch.setattr(module, "self_check", refuse)
    monkeypatch.setenv("SKV_HOME", str(tmp_path / "other"))
    assert main([*argv, "--out", str(tmp_path / "refused")]) == 2
    assert "skv: LlamaForCausalLM is not what runs" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert main([*argv, "--no-self-check", "--out", str(tmp_path / "trusted")]) == 0
    manifest = json.loads((tmp_path / "trusted" / "run.json").read_text())
    assert manifest["sessions"][0]["self_check"] is None
    assert any("--no-self-check" in note for note in manifest["notes"])
    assert "self-check was skipped" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["a bias dropped", "a norm changed"])
def test_weights_that_are_not_those_of_the_files_are_refused(lost, monkeypatch, tmp_path, tiny_folder, capsys):
    """Full attention would be judged as something else than the files hold, by a model that agrees with itself."""
    import shutil
    from dataclasses import replace

    from tiny_models import tiny_model
    from transformers import AutoTokenizer

    import shadowkv.models.loading as loading

    folder = tmp_path / "qwen2"
    shutil.copytree(tiny_folder, folder)
    tiny_model("qwen2", vocab_size=len(AutoTokenizer.from_pretrained(tiny_folder))).save_pretrained(folder)
    original = loading.load_model

    def broken_load(*args, **kwargs):
        loaded = original(*args, **kwargs)
        layer = loaded.model.model.layers[1]
        if lost == "a bias dropped":
            layer.self_attn.k_proj.bias = None
        else:
            layer.input_layernorm.weight.add_(0.5)
        return replace(loaded)

    argv = ["eval", "niah", "--model", str(folder), "-m", "full", "--haystack", "synthetic", "--lengths", "512"]
    argv += ["--depths", "1", "--max-new-tokens", "2", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(loading, "load_model", broken_load)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert ("layers.1.self_attn.k_proj.bias" if lost == "a bias dropped" else "layers.1.input_layernorm") in said
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(loading, "load_model", original)
    assert main(argv) == 0
