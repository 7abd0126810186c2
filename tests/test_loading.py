"""--model: what it may be, and one line for everything it may not."""

from __future__ import annotations

import json
import shutil
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadowkv.common.errors import SkvError
from shadowkv.models.loading import context_tokens, load_config, load_model, load_tokenizer, weights_sha256
from shadowkv.models.model_size import model_size
from shadowkv.models.packs import pack_path
from shadowkv.models.presets import presets
from shadowkv.models.resolving import ModelSource, resolve


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to leave the machine fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"network attempt: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_folder_loads_without_network(tiny_folder, no_network):
    loaded = load_model(resolve(str(tiny_folder)), device="cpu")
    assert loaded.name == "tiny-llama"
    assert loaded.context_tokens == 4096
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert len(loaded.weights_sha256) == 64
    assert loaded.stop_ids


def test_pulled_presets_load_without_network(no_network):
    if pack_path("smollm2-135m") is None:
        pytest.skip("smollm2-135m is not pulled")
    loaded = load_model(resolve("smollm2-135m"), device="cpu")
    assert loaded.context_tokens == 8192
    assert loaded.tokenizer.chat_template
    assert loaded.tokenizer.convert_ids_to_tokens(sorted(loaded.stop_ids)) == ["<|im_end|>"]


def test_what_the_hub_cache_holds_loads_without_network(tiny_folder, tmp_path, monkeypatch, no_network):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    entry = tmp_path / "models--meta-llama--Llama-3.1-8B-Instruct"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("c0ffee")
    shutil.copytree(tiny_folder, entry / "snapshots" / "c0ffee")
    for name in ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1-8b"):
        source = resolve(name)
        assert source.folder == entry / "snapshots" / "c0ffee"
        assert load_model(source, device="cpu").model.config.num_hidden_layers == 3
    (entry / "snapshots" / "c0ffee" / "model.safetensors").unlink()
    with pytest.raises(SkvError, match="not on this machine"):
        resolve("llama3.1-8b")  # a cache entry without weights is no model


@pytest.mark.parametrize("name", ["llama3.1-8b", "org/model"])
def test_offline_absence_is_found_at_once(name, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(SkvError, match=r"not on this machine.*give --model PATH"):
        resolve(name)
    assert time.perf_counter() - started < 10


def test_an_unreachable_hub_is_said_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("SKV_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SkvError, match="the Hub cannot be reached"):
        resolve("org/model")


def test_unpulled_presets_name_the_command(monkeypatch, tmp_path):

    monkeypatch.setenv("SKV_HOME", str(tmp_path))
    with pytest.raises(SkvError, match="run 'skv pull smollm2-135m'"):
        resolve("smollm2-135m")


def damaged(tiny_folder, tmp_path, name, content):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", b"\x10" * 100, "model.safetensors is damaged"),
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("model.safetensors", None, "holds no safetensors weights"),
        ("config.json", b"{}", "config.json of damaged cannot be read"),
        ("config.json", b"{", "config.json of damaged cannot be read"),
        ("config.json", b"[]", "config.json of damaged cannot be read"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}', "config.json of damaged cannot be read"),
        ("tokenizer.json", b"{", "the tokenizer of damaged cannot be read"),
        ("tokenizer_config.json", b"[]", "the tokenizer of damaged cannot be read"),
        ("generation_config.json", b"[]", "the weights of damaged cannot be read"),
    ],
)
def test_damaged_files_are_named_in_one_line(tiny_folder, tmp_path, name, content, says):
    folder = damaged(tiny_folder, tmp_path, name, content)
    with pytest.raises(SkvError, match=says) as caught:
        load_model(resolve(str(folder)), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_truncated_weight_file_is_named(tiny_folder, tmp_path):
    whole = (tiny_folder / "model.safetensors").read_bytes()
    folder = damaged(tiny_folder, tmp_path, "model.safetensors", whole[: len(whole) // 2])
    with pytest.raises(SkvError, match=r"model\.safetensors is damaged"):
        load_model(resolve(str(folder)), device="cpu")


def lacking(folder):
    """Weights without one of the layers."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigured(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lacking, r"lack \d+ tensors, model\.layers\.1\."),
        (reconfigured(num_hidden_layers=5), r"lack \d+ tensors, model\.layers\.3\."),
        (reconfigured(intermediate_size=200), r"have another shape of \d+ tensors, model\.layers\.0\.mlp"),
    ],
)
def test_a_model_that_would_be_partly_random_is_refused(tiny_folder, tmp_path, change, says):
    folder = tmp_path / "partial"
    shutil.copytree(tiny_folder, folder)
    change(folder)
    with pytest.raises(SkvError, match=says):
        load_model(resolve(str(folder)), device="cpu")


def test_an_interrupted_download_is_not_taken_for_a_model(tiny_folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    entry = tmp_path / "models--org--model"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("c0ffee")
    snapshot = entry / "snapshots" / "c0ffee"
    shutil.copytree(tiny_folder, snapshot)
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(SkvError, match="not on this machine"):
        resolve("org/model")
    (snapshot / shards["b"]).write_bytes(b"")
    assert resolve("org/model").folder == snapshot


def test_a_file_that_is_no_gguf_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SKV_HOME", str(tmp_path / "home"))
    for content in (b"not a model", b"GGUF", b"GGUF" + b"\x00" * 50, b"GGUF\x03\x00\x00\x00" + b"\xff" * 50):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        with pytest.raises(SkvError, match=r"model\.gguf") as caught:
            resolve(str(path))
        assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_loaded(tiny_folder, tmp_path):
    folder = damaged(tiny_folder, tmp_path, "model.safetensors", None)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(SkvError, match="other formats can run code"):
        load_model(resolve(str(folder)), device="cpu")


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(SkvError, match=r"holds no config\.json"):
        resolve(str(tmp_path))


def test_remote_code_needs_the_flag(tiny_folder, tmp_path):
    config = b'{"model_type": "own-model", "auto_map": {"AutoConfig": "configuration.Own"}}'
    folder = damaged(tiny_folder, tmp_path, "config.json", config)
    with pytest.raises(SkvError, match="--trust-remote-code"):
        load_config(resolve(str(folder)))


@pytest.mark.parametrize("name", presets())
def test_every_preset_describes_a_model_that_can_be_built(name, monkeypatch, tmp_path):
    """From the preset alone: the config that a dummy run uses, its tokenizer, and a plausible size."""
    from huggingface_hub import constants

    monkeypatch.setenv("SKV_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = resolve(name, dummy=True)
    config, preset = load_config(source), presets()[name]
    size = model_size(config, 2)
    dims = size.dims
    assert (dims.q_heads, dims.kv_heads, dims.head_dim) == (preset.q_heads, preset.kv_heads, preset.head_dim)
    billions = size.parameters / 1e9
    told = {"8b": 8.0, "9b": 9.1, "mini": 3.8, "7b": 7.6, "135m": 0.135, "270m": 0.27}
    expected = next(size for part, size in told.items() if part in name)
    assert billions == pytest.approx(expected, rel=0.06)
    tokenizer = load_tokenizer(source)
    assert tokenizer.decode(tokenizer("wörd 12")["input_ids"]) == "wörd 12"


def test_weights_that_cannot_fit_are_refused_before_they_are_made(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("os.sysconf", lambda _: 2**15)
    with pytest.raises(SkvError, match="billion parameters"):
        load_model(resolve("llama3.1-8b", dummy=True), device="cpu", dummy=True)


def test_the_checksum_follows_the_weights(tiny_folder, tmp_path):
    other = damaged(tiny_folder, tmp_path, "model.safetensors", b"something else")
    assert weights_sha256(other) != weights_sha256(tiny_folder)


def test_a_manifest_that_is_not_ours_is_not_believed(tiny_folder, tmp_path):
    manifest = json.dumps({"files": {"model.safetensors": "0" * 64}}).encode()
    assert weights_sha256(damaged(tiny_folder, tmp_path, "manifest.json", manifest)) == weights_sha256(tiny_folder)


def test_a_models_own_config_limits_what_its_preset_promises(tiny_folder):
    """Qwen2 declares 32K until its user adds YaRN: longer prompts would be extrapolation that nobody announced."""
    source = ModelSource("qwen2-7b-128k", tiny_folder, presets()["qwen2-7b-128k"], "folder")
    assert context_tokens(source, load_config(source)) == 4096
