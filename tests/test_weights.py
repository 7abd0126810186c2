"""What weight files hold is loaded, or refused, or named in every table."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_model

from cli.main import main
from evals.runs.results import read_run
from shadowkv.common.errors import SkvError
from shadowkv.models.loading import load_model, weights_sha256
from shadowkv.models.packs import pack_path
from shadowkv.models.resolving import resolve, with_adapter
from shadowkv.models.weights import check_weights_loaded

SMALL = ["--lengths", "512", "--depths", "1", "--haystack", "synthetic", "--max-new-tokens", "4", "-m", "full"]


@pytest.fixture
def changed(tiny_folder, tmp_path):
    """A copy of the tiny model's folder, its tensors changed by a function or its config by fields."""

    def make(change=None, **fields):
        folder = tmp_path / "changed"
        shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
        if change is not None:
            weights = load_file(folder / "model.safetensors")
            change(weights)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    return make


def loaded(folder, *allowed):
    return load_model(resolve(str(folder)), device="cpu", allow_unexpected=allowed)


def with_biases(weights):
    for name in [name for name in weights if name.endswith("self_attn.q_proj.weight")]:
        weights[name.replace("weight", "bias")] = torch.ones(len(weights[name]))


def with_scales(weights):
    for name in [name for name in weights if name.endswith("mlp.up_proj.weight")]:
        weights[name + "_scale_inv"] = torch.ones(1, 1)
        weights[name] = weights[name].to(torch.float8_e4m3fn)


UNEXPECTED = {
    "biases": (with_biases, {}, r"3 tensors .* model\.layers\.0\.self_attn\.q_proj\.bias", "model.layers.*.bias"),
    "layers": (None, {"num_hidden_layers": 2}, r"9 tensors .* model\.layers\.2\.", "model.layers.2.*"),
    "scales": (with_scales, {}, r"3 tensors .*up_proj\.weight_scale_inv", "*_scale_inv"),
}


@pytest.mark.parametrize("what", UNEXPECTED)
def test_what_a_model_does_not_have_is_refused_unless_it_is_named(changed, what):
    change, fields, says, pattern = UNEXPECTED[what]
    folder = changed(change, **fields)
    for allowed in ((), ("lm_head.*",)):
        with pytest.raises(SkvError, match=says) as caught:
            loaded(folder, *allowed)
        assert "--allow-unexpected-weights" in str(caught.value)
        assert "\n" not in str(caught.value)
    for allowed in ((pattern,), ("*",), ("nothing", pattern)):
        assert loaded(folder, *allowed).not_loaded


def test_missing_tensors_are_never_allowed(changed):
    folder = changed(lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(SkvError, match=r"lack 1 tensors, model\.norm\.weight"):
        loaded(folder, "*")


def test_tables_of_rotary_embedding_do_not_block(changed):
    """Checkpoints of before 2023 hold them in every layer; every model computes its own."""

    def old(weights):
        for layer in range(3):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    assert loaded(changed(old)).not_loaded == ()


@pytest.mark.parametrize("number", [2, 61])
def test_only_a_draft_head_is_taken_for_one(tmp_path, number, tiny_folder):
    """transformers drops layer 61 of every DeepSeek-V3: right for the published model of 61 layers, for no other."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "n_group": 1}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "topk_group": 1, "first_k_dense_replace": 2}
    config = AutoConfig.for_model("deepseek_v3", vocab_size=99, **sizes, **heads, **experts, num_nextn_predict_layers=1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {f"model.layers.{number}.eh_proj.weight": torch.ones(2, 2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SkvError, match=rf"1 tensor that .* model\.layers\.{number}\.eh_proj"):
        loaded(tmp_path)


def test_shards_of_no_index_are_not_passed_over(changed):
    folder = changed()
    shutil.copy(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    with pytest.raises(SkvError, match="1 weight file that would not be loaded, model-00002-of-00002"):
        loaded(folder)
    assert loaded(folder, "model-*").not_loaded == ("model-00002-of-00002.safetensors",)
    (folder / "model-00002-of-00002.safetensors").rename(folder / "consolidated.safetensors")
    assert loaded(folder).not_loaded == ()
    assert loaded(folder).weights_sha256 == weights_sha256(changed()), "of what is loaded, and nothing else"


def test_tables_name_what_was_left_aside_and_such_runs_do_not_mix(changed, tmp_path, capsys):
    folder = changed(with_biases)
    words = ["eval", "niah", "--model", str(folder), *SMALL]
    assert main([*words, "--out", str(tmp_path / "no")]) == 2
    assert "holds 3 tensors" in capsys.readouterr().err
    allowed = [*words, "--out", str(tmp_path / "run"), "--allow-unexpected-weights", "lm.*,model.layers.*.bias"]
    assert main(allowed) == 0
    manifest = read_run(tmp_path / "run")[0]
    assert manifest.model["not_loaded"]["count"] == 3
    note = "not loaded, of what the files hold: model.layers.0.self_attn.q_proj.bias"
    assert note in " ".join(manifest.notes)
    assert note in (tmp_path / "run" / "summary.md").read_text()
    changed()  # the same folder, now without them
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "model.not_loaded" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "run"), "--dummy", "--allow-unexpected-weights", "*"]) == 2
    assert "--dummy loads none" in capsys.readouterr().err


def test_comparisons_tell_such_models_apart(changed, tmp_path, capsys):
    folder = changed(with_biases)
    run = ["eval", "niah", "--model", str(folder), *SMALL, "--allow-unexpected-weights", "*", "-q"]
    assert main([*run, "--out", str(tmp_path / "a")]) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    kept = json.loads((tmp_path / "b" / "run.json").read_text())
    del kept["model"]["not_loaded"]
    (tmp_path / "b" / "run.json").write_text(json.dumps(kept))
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "model.not_loaded" in capsys.readouterr().err


# ---- GGUF


def gguf(model, path, more):
    """A Llama as a GGUF file of fp32 tensors, with others beside its own."""
    import numpy as np
    from gguf import GGUFWriter

    config, own = model.config, model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(0x100 + i) for i in range(config.vocab_size - 1)]
    letters.append(letters[0] + letters[1])
    writer.add_token_list(letters)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_eos_token_id(0)
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        writer.add_tensor(f"{theirs}.weight", own[f"{ours}.weight"].numpy())
    for name, size in more.items():
        writer.add_tensor(name, np.ones(size, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "more", [{}, {"rope_freqs.weight": 8}, {"blk.0.attn_q.bias": 64, "blk.3.attn_norm.weight": 64}]
)
def test_what_a_gguf_file_holds_is_converted_or_named(tmp_path, monkeypatch, more):
    """transformers passes over these in silence: Llama 3.1's rotary factors are one of them."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("SKV_HOME", str(tmp_path / "home"))
    path = gguf(tiny_model("llama"), tmp_path / "made.gguf", more)
    if not more:
        assert loaded(path).not_loaded == ()
        manifest = next((tmp_path / "home" / "converted").glob("*/manifest.json"))
        old = json.loads(manifest.read_text())
        del old["unused"]
        manifest.write_text(json.dumps(old))
        resolve(str(path))
        assert json.loads(manifest.read_text())["unused"] == [], "made anew, since nobody had looked"
        return
    with pytest.raises(SkvError, match=f"{len(more)} tensors? that .* {sorted(more)[0]}"):
        loaded(path)
    assert loaded(path, "*").not_loaded == tuple(sorted(more))


# ---- adapters


def lora(folder, base, **changes):
    """A LoRA of the first two layers' queries."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight": torch.randn(
            shape, generator=generator
        )
        for layer in (0, 1)
        for half, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    made = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 4}
    made |= {"lora_alpha": 8, "target_modules": ["q_proj"], "inference_mode": True}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(made | changes))
    return tensors


@pytest.fixture
def no_peft(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))


def test_an_adapter_beside_weights_is_refused_or_left_aside(changed):
    """With peft installed transformers would load it by itself."""
    plain, checksum = loaded(changed()).model.state_dict(), weights_sha256(changed())
    folder = changed()
    lora(folder, folder)
    with pytest.raises(SkvError, match=r"--adapter .*changed merges it, --allow-unexpected-weights 'adapter\*'"):
        loaded(folder)
    dry = ["eval", "niah", "--model", str(folder), *SMALL, "--dry-run"]
    assert [main(dry), main([*dry, "--allow-unexpected-weights", "adapter*"])] == [2, 0], "said before anything is done"
    without = loaded(folder, "adapter*")
    assert without.not_loaded == ("adapter_config.json", "adapter_model.safetensors")
    assert without.weights_sha256 == checksum
    assert without.model.state_dict().keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in without.model.state_dict().items())


def test_a_folder_of_an_adapter_alone_says_how_to_use_it(tiny_folder, tmp_path):
    lora(tmp_path / "lora", "org/base")
    with pytest.raises(SkvError, match=r"only an adapter: --model org/base --adapter .*lora"):
        resolve(str(tmp_path / "lora"))
    shutil.copy(tiny_folder / "config.json", tmp_path / "lora")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path / "lora")
    with pytest.raises(SkvError, match="only an adapter"):
        loaded(tmp_path / "lora")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("adapter_config.json", None, "holds no adapter_config.json"),
        ("adapter_model.safetensors", None, "holds no adapter_model.safetensors"),
        ("adapter_model.safetensors", b"\x10" * 100, r"adapter_model\.safetensors is damaged"),
        ("adapter_config.json", b"{", r"adapter_config\.json is damaged"),
        ("adapter_config.json", b"[]", r"adapter_config\.json is damaged"),
        ("adapter_config.json", b'{"peft_type": "PREFIX_TUNING"}', "only a LoRA is merged"),
        ("", None, "no such folder"),
        ("nothing", b"", r"pip install 'skv\[adapters\]'"),
    ],
)
def test_damaged_adapters_are_one_line(tiny_folder, tmp_path, capsys, no_peft, name, content, says):
    folder = tmp_path / "lora"
    lora(folder, tiny_folder)
    if not name:
        folder = tmp_path / "nowhere"
    elif content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(SkvError, match=says) as caught:
        with_adapter(resolve(str(tiny_folder)), folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_is_merged_and_makes_another_model(tiny_folder, changed, tmp_path, capsys):
    pytest.importorskip("peft")
    tensors = lora(tmp_path / "lora", tiny_folder)
    source = with_adapter(resolve(str(tiny_folder)), tmp_path / "lora")
    merged, plain = load_model(source, device="cpu"), loaded(tiny_folder)
    assert merged.name == "tiny-llama+lora"
    assert merged.weights_sha256 == plain.weights_sha256
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.q_proj"
        added = merged.model.get_parameter(f"{name}.weight") - plain.model.get_parameter(f"{name}.weight")
        a, b = (tensors.get(f"base_model.model.{name}.lora_{half}.weight", torch.zeros(4, 4)) for half in "AB")
        expected = 2 * b @ a if layer < 2 else torch.zeros(64, 64)
        torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-5)
    words = ["eval", "niah", "--model", str(tiny_folder), *SMALL]
    assert main([*words, "--adapter", str(tmp_path / "lora"), "--out", str(tmp_path / "run")]) == 0
    manifest = read_run(tmp_path / "run")[0]
    assert manifest.model["adapter"]["sha256"] == source.adapter.sha256
    assert "tiny-llama+lora" in manifest.title
    assert "the adapter lora" in " ".join(manifest.notes)
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "model.adapter" in capsys.readouterr().err
    assert main([*words, "-q", "--out", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "run"), str(tmp_path / "plain")]) == 2
    assert "model.adapter" in capsys.readouterr().err
    beside = changed()
    lora(beside, beside)
    source = with_adapter(resolve(str(beside)), beside)
    assert load_model(source, device="cpu").not_loaded == (), "the one that is beside the weights, asked for"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: {name: x[:, :32].contiguous() if "lora_A" in name else x for name, x in t.items()},
            "does not fit this model",
        ),
        (lambda t: {name.replace("layers.1", "layers.7"): x for name, x in t.items()}, "it holds 2 tensors"),
        (lambda t: {name: x for name, x in t.items() if "layers.0" not in name or "_A" not in name}, "lacks 1 tensor"),
    ],
)
def test_adapters_of_other_models_are_one_line(tiny_folder, tmp_path, change, says):
    pytest.importorskip("peft")
    tensors = lora(tmp_path / "lora", tiny_folder)
    save_file(change(tensors), tmp_path / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SkvError, match=says) as caught:
        load_model(with_adapter(resolve(str(tiny_folder)), tmp_path / "lora"), device="cpu")
    assert "\n" not in str(caught.value)


# ---- what was loaded, against the files


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_was_loaded_is_what_its_files_say(tmp_path, family, dtype):
    from transformers import AutoModelForCausalLM

    tied = {"tie_word_embeddings": True} if family in ("qwen2", "gemma3") else {}
    tiny_model(family, **tied).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    check_weights_loaded(model, tmp_path)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[-1] += 1
    with pytest.raises(SkvError, match=r"model\.norm\.weight is not the one"):
        check_weights_loaded(model, tmp_path)


@pytest.mark.parametrize("row", [0, -1])
def test_what_was_lost_or_changed_is_named(tmp_path, row):
    made = tiny_model("qwen2")
    made.save_pretrained(tmp_path)
    check_weights_loaded(made, tmp_path)
    changed = copy.deepcopy(made)
    changed.model.layers[1].mlp.up_proj.weight[row] = 0
    with pytest.raises(SkvError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not the one"):
        check_weights_loaded(changed, tmp_path)
    lost = copy.deepcopy(made)
    lost.model.layers[1].self_attn.k_proj.bias = None
    with pytest.raises(SkvError, match=r"lacks 1 of its parameters, model\.layers\.1\.self_attn\.k_proj\.bias first"):
        check_weights_loaded(lost, tmp_path)
    headless = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): x for name, x in headless.items() if name != "lm_head.weight"}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SkvError, match=r"layers\.1\.mlp\.up_proj\.weight is not the one"):
        check_weights_loaded(changed, tmp_path)


def test_what_was_quantised_is_passed_over(tmp_path):
    made = tiny_model("llama")
    made.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if "proj" in name]:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_weights_loaded(made, tmp_path)


def test_the_look_is_quick():
    folder = pack_path("smollm2-135m")
    if folder is None:
        pytest.skip("smollm2-135m is not pulled")
    model = load_model(resolve("smollm2-135m"), device="cpu").model
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        check_weights_loaded(model, folder)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1, "0.1 s on an idle machine"
