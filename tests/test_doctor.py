"""`skv doctor`: everything is looked for, what is missing comes with the command that gets it, what is broken fails."""

from __future__ import annotations

import json
import shutil

import pytest

from cli.main import main
from cli.models import doctor
from shadowkv.models.packs import packs
from shadowkv.models.presets import presets


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with the required packages and nothing else."""
    from huggingface_hub import constants

    real = doctor.installed
    optional = {"triton", "jieba", "peft", "flashinfer-python", "vllm"}
    monkeypatch.setenv("SKV_HOME", str(tmp_path / "not" / "made"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(doctor, "installed", lambda name: None if name in optional else real(name))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def findings(capsys, code=0):
    assert main(["doctor", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    return {one["name"]: one for group in told.values() for one in group}


def test_everything_that_is_missing_says_what_it_enables_and_how_to_get_it(bare, capsys):
    found = findings(capsys)
    missing = {name for name, one in found.items() if one["state"] == "missing"}
    hub = {name for name, preset in presets().items() if preset.pack is None}
    optional = {"triton", "jieba", "peft", "flashinfer-python", "vllm"}
    assert missing == {*packs(), *hub, *optional, "GPU", "C compiler", "kernels"}
    assert all(found[name]["enables"] and found[name]["command"] for name in missing)
    assert found["essays"]["command"] == "skv pull essays"
    assert found["yi-9b-200k"]["command"] == "hf download 01-ai/Yi-9B-200K"
    gated = found["llama3.1-8b"]["command"]
    assert gated.startswith("accept the licence on https://huggingface.co/meta-llama/")
    assert "hf auth login" in gated
    assert "SKV_OFFLINE=1" in found["fetching"]["found"]
    assert "GiB free" in found["SKV_HOME"]["found"]
    assert {name for name, one in found.items() if one["state"] == "here"} >= {"skv", "python", "torch", "transformers"}


def test_a_line_says_it_all_on_any_terminal(bare, capsys, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr("cli.shared.render.console", lambda *, stderr=False: Console(stderr=stderr, width=40))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("skv[gpu]" in line and "triton" in line and "the fast engine" in line for line in lines)
    assert any(line.endswith("->  hf download 01-ai/Yi-9B-200K") for line in lines)
    assert next(line for line in lines if "smollm2-135m" in line).endswith("->  skv pull smollm2-135m")


def test_a_gpu_is_shown_with_its_memory_and_capability(bare, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda number: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda number: (9, 0))
    monkeypatch.setattr(doctor, "installed", lambda name: "3.9.0")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    found = {one.name: one for one in (*doctor.CHECKS["machine"](), *doctor.CHECKS["kernels"]())}
    assert found["cuda:1"].found == "NVIDIA H100 80GB HBM3, 80 GiB, 70 free, sm_90"
    assert found["C compiler"].found == "/usr/bin/cc"
    assert found["kernels"].found.startswith("compiled")


def test_without_a_compiler_kernels_are_missing(bare, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "3.9.0")
    found = {one.name: one for one in doctor.CHECKS["kernels"]()}
    assert found["kernels"].state == found["C compiler"].state == "missing"
    assert "gcc" in found["kernels"].command


@pytest.mark.parametrize(("version", "said"), [(None, "not installed"), ("4.0.0", "4.0.0")])
def test_a_required_package_that_is_missing_or_of_another_version_is_broken(bare, version, said, monkeypatch, capsys):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: version if name == "transformers" else real(name))
    found = findings(capsys, code=1)["transformers"]
    assert found["state"] == "broken"
    assert said in found["found"]
    assert found["command"].startswith("pip install 'transformers")


def test_a_torch_that_does_not_load_is_broken_and_the_rest_is_told(bare, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "load_torch", lambda: (None, "libcudart.so.12: cannot open shared object file"))
    found = findings(capsys, code=1)
    assert found["torch loads"]["state"] == "broken"
    assert "libcudart" in found["torch loads"]["found"]
    assert found["GPU"]["state"] == "missing"
