"""`skv plan` as a user meets it."""

from __future__ import annotations

import json
import shutil

import pytest
from test_cli import mistake
from tiny_models import tiny_model

from cli.main import main

ASKED = ["plan", "--model", "llama3.1-8b", "--gpu", "a100-80g"]
KEYS = [
    "method", "context", "max_batch", "device_bytes", "host_bytes", "floor_ms", "chained_floor_ms", "step_ms",
    "tokens_per_s", "bound_by",
]  # fmt: skip


def told(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out)


def test_json_is_the_plans_in_the_order_asked_and_nothing_else(capsys):
    said = told(capsys, *ASKED, "--context", "122k,60k", "-m", "quest", "-m", "full")
    assert list(said) == ["plans"]
    assert all(list(plan) == KEYS for plan in said["plans"])
    asked = [(plan["context"], plan["method"]) for plan in said["plans"]]
    assert asked == [(c * 1024, m) for c in (122, 60) for m in ("quest", "full")]
    full = said["plans"][3]
    assert full["max_batch"] == 8
    assert full["tokens_per_s"] == pytest.approx(8000 / full["step_ms"])
    assert full["bound_by"] == "hbm"
    assert full["host_bytes"] == 0


def test_the_published_engine_holds_the_authors_batch(capsys):
    asked = [*ASKED, "--context", "122k", "-m", "shadowkv"]
    ours, theirs = (told(capsys, *asked, *more)["plans"][0] for more in ([], ["--as-published"]))
    assert (theirs["method"], theirs["max_batch"]) == ("shadowkv (as published)", 24)
    # Ours indexes resident chunks where theirs moves them, and needs no copies of selections in between.
    assert (ours["method"], ours["max_batch"]) == ("shadowkv", 24)
    assert ours["step_ms"] < theirs["step_ms"] < 1.05 * ours["step_ms"]
    said = told(capsys, *asked, "-m", "shadowkv:rank=64+minference", "-m", "full", "--as-published")
    labels = ["shadowkv (as published)", "shadowkv:rank=64+minference (as published)", "full"]
    assert [plan["method"] for plan in said["plans"]] == labels


def test_tables_say_what_was_assumed(capsys):
    assert main([*ASKED, "--context", "122k", "--host-memory", "64GB"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "nothing was run",
        "1600 GB/s memory",
        "host memory 59.60 GiB",
        "host-memory",
        "landmarks",
        "factors",
    ):
        assert words in said
    assert main([*ASKED, "--context", "122k"]) == 0
    assert "host memory unlimited" in " ".join(capsys.readouterr().out.split())


def test_limits_given_by_the_user(capsys):
    asked = [*ASKED, "--context", "60k", "-m", "shadowkv:budget=1024"]
    free, host, device, given = (
        told(capsys, *asked, *more)["plans"][0]
        for more in ([], ["--host-memory", "50GiB"], ["--memory-cap", "40GB"], ["--batch", "3"])
    )
    assert host["max_batch"] == 50 * 2**30 // (host["host_bytes"] // host["max_batch"]) < free["max_batch"]
    assert host["host_bytes"] <= 50 * 2**30
    assert device["max_batch"] < free["max_batch"]
    assert device["device_bytes"] <= 40e9
    assert given["max_batch"] == free["max_batch"]
    assert given["device_bytes"] < device["device_bytes"]
    assert given["tokens_per_s"] == pytest.approx(3000 / given["step_ms"])


def test_what_does_not_fit_is_a_plan_too(capsys):
    asked = ["plan", "--model", "llama3.1-8b", "--gpu", "rtx3090", "--context", "122k", "-m", "full"]
    plan = told(capsys, *asked)["plans"][0]
    assert (plan["max_batch"], plan["step_ms"], plan["tokens_per_s"]) == (0, None, None)
    assert plan["bound_by"] == "device-memory"
    assert plan["device_bytes"] > 24e9
    assert main(asked) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in said
    assert "not one sequence fits" in said


def test_out_writes_plot_table_and_json(capsys, tmp_path):
    out = tmp_path / "deep" / "plans"
    said = told(capsys, *ASKED, "--out", str(out))
    assert {plan["context"] for plan in said["plans"]} == {16384, 32768, 65536, 131072}
    assert json.loads((out / "plan.json").read_text()) == said
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "nothing was run" in (out / "plan.md").read_text()


def test_a_plot_without_anything_that_fits(tmp_path):
    out = tmp_path / "plans"
    assert main([*ASKED, "--memory-cap", "1GB", "--out", str(out)]) == 0
    assert (out / "plan.png").is_file()


def test_a_folder_needs_no_weights(capsys, tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.json"]
    plans = told(capsys, "plan", "--model", str(tmp_path / "mine"), "--gpu", "l4", "--context", "4k", "-m", "full")
    assert plans["plans"][0]["max_batch"] > 1000


def test_a_config_in_the_hub_cache_is_enough(capsys, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    entry = tmp_path / "models--org--mine"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("c0ffee")
    tiny_model("llama").config.save_pretrained(entry / "snapshots" / "c0ffee")
    asked = ["plan", "--model", "org/mine", "--gpu", "l4", "--context", "1k", "-m", "full"]
    assert told(capsys, *asked)["plans"][0]["context"] == 1024
    shutil.rmtree(entry)
    assert "not on this machine" in mistake(capsys, *asked)


def test_a_method_that_cannot_serve_the_model_is_named(capsys):
    assert main(["plan", "--model", "smollm2-135m", "--gpu", "l4", "-m", "full", "-m", "shadowkv:rank=400"]) == 1
    said = capsys.readouterr()
    assert "unsupported: shadowkv:rank=400" in said.err
    assert "full" in said.out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--gpu", "h20"], "did you mean 'h200'"),
        (["--gpu", "absent.json"], "cannot read absent.json"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--batch", "-2"], "--batch must be at least 1"),
        (["--batch", "many"], "unable to parse string as an integer"),
        (["--context", "512k"], "beyond this model's context of 131072"),
        (["--context", "long"], "'long' is not a length"),
        (["--memory-cap", "80XB"], "--memory-cap: '80XB' is not a size; write 80GB"),
        (["--host-memory", "-1GB"], "--host-memory: '-1GB' is not a size"),
        (["--host-memory", "0"], "is not a size"),
        (["--dtype", "bfloat"], "did you mean 'bfloat16'"),
        (["--model", "llama3.1"], "did you mean 'llama3.1-8b'"),
        (["-m", "shadwkv"], "did you mean 'shadowkv'"),
        (["-m", "full", "--as-published"], "which is not among the methods"),
        (["-m", "shadowkv:values=int8", "--as-published"], "the published engine has neither coded values"),
    ],
)
def test_mistakes_are_one_line(capsys, more, says):
    assert says in mistake(capsys, *ASKED, *more)


def test_out_must_be_a_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is not a folder" in mistake(capsys, *ASKED, "--out", str(tmp_path / "file" / "plans"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80e9), ("80g", 80e9), ("80GiB", 80 * 2**30), ("1.5 TiB", 1.5 * 2**40), ("512m", 512e6), ("1000", 1000)],
)
def test_sizes_are_read_as_written(text, size):
    from shadowkv.common.sizes import parse_bytes

    assert parse_bytes(text) == size


def test_a_machine_can_be_described_in_a_file(capsys, tmp_path):
    """A laptop's CPU, whose host is itself."""
    (tmp_path / "laptop.yaml").write_text(
        "memory_bytes: 16GiB\nbandwidth_bytes_per_s: 40e9\nlink_bytes_per_s: 40GB\nflop_per_s: 1e12\n"
        "layer_overhead_ms: 0.2\n"
    )
    asked = ["plan", "--model", "smollm2-135m", "--gpu", str(tmp_path / "laptop.yaml"), "--context", "4k"]
    plans = told(capsys, *asked, "-m", "all", "--dtype", "float32")["plans"]
    assert len(plans) >= 14
    assert all(plan["max_batch"] > 10 and plan["tokens_per_s"] > 0 for plan in plans)
    assert all(0 < plan["device_bytes"] <= 16 * 2**30 for plan in plans)
    assert main([*asked, "--dtype", "float32"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "as laptop.yaml says" in said
    assert "those of 16 bits" in said
