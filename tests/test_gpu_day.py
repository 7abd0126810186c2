"""A day on a GPU, run on a CPU in its smallest form, and what it does about limits, failures and interruptions."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer.main
from test_cli import mistake

from cli.main import app, main
from evals.bench.gpu_day import machine
from evals.bench.gpu_day.agreement import engines_agree
from evals.bench.gpu_day.day import Day, code_root
from evals.bench.gpu_day.machine import Card, RealModel, lacking_modules, lacks
from evals.bench.gpu_day.probe_dense import compiled_dense_layer
from evals.bench.gpu_day.report import exit_code_of, page
from evals.bench.gpu_day.stages import MOST_SECONDS, Stage, stages
from evals.bench.gpu_day.state import FILE, read_state
from shadowkv.contract.registry import parse_method
from shadowkv.models.presets import presets

# What a machine may lack that has torch and transformers, beside the two that all need.
UNNEEDED = ("accelerate", "datasets", "gguf", "itables", "jieba", "rouge", "scipy", "selenium")
MODEL = RealModel("llama3.1-8b", True, 160, 2048, "32k")
H100 = Card("NVIDIA H100 80GB HBM3", 80 * 2**30)


def without(folder, *modules):
    """An environment in which these modules cannot be imported."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n")
    paths = [str(folder), str(code_root()), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def skv(*words, env):
    argv = [sys.executable, "-m", "cli", "bench", "gpu-day", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False, env=env, timeout=300)


@pytest.fixture(scope="module")
def tiny_day(tmp_path_factory):
    """All stages, run once."""
    folder = tmp_path_factory.mktemp("day")
    env = without(folder / "site", *UNNEEDED)
    done = skv("--tiny", "--out", str(folder / "out dir"), "--quiet", env=env)
    return SimpleNamespace(out=folder / "out dir", done=done, env=env)


def test_every_stage_runs_on_a_cpu_or_says_why_not(tiny_day):
    assert tiny_day.done.returncode == 0, tiny_day.done.stderr
    kept = read_state(tiny_day.out)
    assert list(kept) == list(stages())
    assert {name: entry.status for name, entry in kept.items() if entry.status != "done"} == {"tests": "skipped"}
    assert kept["tests"].said == "needs CUDA"
    for name, entry in kept.items():
        assert entry.machine == "a CPU"
        assert len(entry.ran) == len(stages()[name].tiny)
        assert all((tiny_day.out / file).is_file() for file in entry.files)
        assert entry.status == "skipped" or f"{name}/stage.log" in entry.files
    for wanted in ("kernels/run/kernels.jsonl", "throughput/tiny/throughput.jsonl", "latency/shadowkv.json"):
        assert (tiny_day.out / wanted).stat().st_size > 0
    assert "full: 8/8 tokens alike; shadowkv:budget=64,rank=8: 8/8 tokens alike" in kept["correct"].said


def test_what_is_lacking_is_said_in_one_line(tiny_day):
    (said,) = [line for line in tiny_day.done.stderr.splitlines() if "not here: " in line]
    for name in set(UNNEEDED) & set(machine.LATER):
        assert f"{name} (no stage; " in said


def test_a_summary_is_printed_and_a_page_written(tiny_day):
    text = (tiny_day.out / "gpu-day.md").read_text()
    for name in stages():
        assert f"│ {name} " in tiny_day.done.stdout
        assert f"## {name}: " in text
    assert "Smallest forms, on a CPU" in text
    assert "skipped: needs CUDA" in tiny_day.done.stdout


def test_the_probe_imitates_nothing(tiny_day):
    told = json.loads((tiny_day.out / "probe" / "probe.json").read_text())
    status = {finding["name"]: finding["status"] for finding in told["findings"]}
    skipped = {"card", "registered_memory", "graph_with_a_side_stream", "registration_rates", "refused_registration"}
    skipped |= {"compiled_dense_layer"}
    assert {name for name, said in status.items() if said == "skipped"} == skipped
    assert {name for name, said in status.items() if said == "ok"} == status.keys() - skipped
    found = {finding["name"]: finding["found"] for finding in told["findings"]}
    assert found["versions"]["torch"]
    assert found["rates"]["copy_gb_s"] > 0
    assert found["triton_kernel"] == {"differs_by": 0.0, "how": "interpreted"}


def test_a_compiled_layer_gives_what_the_layer_gives(monkeypatch):
    """Norms and MLP are compiled, and attention is not, which an engine has of its own."""
    compiled, compile_module = [], torch.nn.Module.compile

    def noting(module, **options):
        compiled.append(type(module).__name__)
        compile_module(module, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", noting)
    found = compiled_dense_layer(torch.device("cpu"), True, backend="eager")
    assert compiled == ["LlamaMLP", "LlamaRMSNorm", "LlamaRMSNorm", "LlamaDecoderLayer"]
    assert found["parts_differ_by"] == found["whole_differs_by"] == 0.0
    assert min(found["us"], found["parts_us"], found["whole_us"]) > 0


def test_what_is_done_is_not_done_again(tiny_day):
    logs = {log: log.read_text() for log in tiny_day.out.glob("*/stage.log")}
    again = skv("--tiny", "--out", str(tiny_day.out), env=tiny_day.env)
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(stages()) - 1
    assert {log: log.read_text() for log in tiny_day.out.glob("*/stage.log")} == logs


def test_again_keeps_the_old_folder(tiny_day):
    done = skv("--tiny", "--out", str(tiny_day.out), "--only", "probe", "--again", env=tiny_day.env)
    assert done.returncode == 0
    assert "versions: ok: python" in done.stdout  # as the command says it
    for folder in ("probe", "probe.before-1"):
        assert (tiny_day.out / folder / "probe.json").is_file()
    assert list(read_state(tiny_day.out)) == list(stages())


def test_a_bare_machine_is_shown_and_probed(tmp_path):
    """Where even what `skv` cannot run without is missing."""
    env = without(tmp_path / "site", "greenlet", "platformdirs", *UNNEEDED)
    for words in (["--list"], ["--dry-run"], ["--tiny", "--out", str(tmp_path / "out"), "--only", "probe,throughput"]):
        done = skv(*words, env=env)
        assert done.returncode == 0, done.stderr
    assert "throughput: skipped: needs greenlet, platformdirs" in done.stderr
    assert "greenlet (throughput)" in done.stderr
    assert json.loads((tmp_path / "out" / "probe" / "probe.json").read_text())["findings"]


def parsed(words):
    """The options of a command as typer reads them; fails on any that it does not know."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context("skv", words).params


@pytest.mark.parametrize("tiny", [False, True], ids=["whole", "tiny"])
def test_every_command_is_one_that_is_taken(tmp_path, tiny):
    day = Day(tmp_path, code_root(), "a card", tiny, 480, MODEL, {"tiny": "a", "tiny4": "b"})
    outs = []
    for stage in stages().values():
        for words in day.commands(stage):
            assert not any("{" in word for word in words)
            if words[0] == "pytest":
                assert Path(words[1]).is_dir()
                continue
            assert words.pop(0) == "skv"
            params = parsed(words)
            outs.append(params.get("out") or params["probe"])
            assert outs[-1].is_relative_to(tmp_path / stage.name)
            for spec in params.get("methods") or filter(None, [params.get("method")]):
                parse_method(spec)
            if "device" in params:
                assert params["device"] == ("cpu" if tiny else "cuda")
                assert tiny or params["model"] in presets()
    assert len(set(outs)) == len(outs)


def test_stages_are_listed_and_their_commands_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "card_here", lambda: H100)
    monkeypatch.setenv("SKV_HOME", str(tmp_path / "home"))
    assert main(["bench", "gpu-day", "--list"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in stages() if name not in listed.split()] == []
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "gpu-day", "--dry-run", "--only", "hits,probe"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "skv bench gpu-day --probe results/h100/probe/probe.json"
    assert "--model smollm2-135m --haystack essays --context 4k" in second
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--only", "kernel"], "unknown stage 'kernel' (did you mean 'kernels'?)"),
        (["--only", ","], "--only names no stage"),
        (["--limit", "0"], "--limit must be 1 to 480 seconds, got 0"),
        (["--limit", "481"], "--limit must be 1 to 480 seconds"),
        ([], "no CUDA device is here; --tiny runs every stage"),
        (["--probe", "nowhere/probe.json"], "cannot write --probe nowhere/probe.json"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, argv, says):
    monkeypatch.setattr(machine, "card_here", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(tmp_path)
    assert says in mistake(capsys, "bench", "gpu-day", *argv)


def test_a_damaged_state_is_one_line(capsys, tmp_path):
    (tmp_path / FILE).write_text('{"stages": [{}]}')
    assert "gpu-day.json is damaged" in mistake(capsys, "bench", "gpu-day", "--tiny", "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-PCIE-16GB", "v100"),
        ("???", "gpu-day"),
    ],
)
def test_results_go_where_the_card_says(name, folder):
    assert Card(name, 1).folder == folder


def test_a_card_is_found_where_torch_finds_one():
    assert (machine.card_here() is not None) == torch.cuda.is_available()


def test_what_a_stage_lacks_skips_it(monkeypatch, tmp_path):
    hits = stages()["hits"]
    monkeypatch.setattr("shadowkv.models.packs.pack_path", lambda name: None)
    here = {"tiny": False, "tests": tmp_path}
    assert lacks(hits, model=RealModel("smollm2-135m", False, 64, 256, "4k"), **here) == (
        "needs smollm2-135m and essays: skv pull smollm2-135m essays, where there is a network"
    )
    assert lacks(stages()["throughput"], model=None, **here) == ""
    nowhere = lacks(stages()["tests"], tiny=False, model=None, tests=tmp_path / "tests")
    assert nowhere == "needs the repository's folder of tests"
    monkeypatch.setattr(machine, "_lacks", lambda module: module in ("greenlet", "rouge"))
    assert lacks(hits, model=MODEL, **here) == "needs greenlet"
    assert lacking_modules([hits, stages()["probe"]]) == {"greenlet": ["hits"], "rouge": ["no stage; LongBench"]}


# What a stage of the following tests runs: a module that does what it is told.
STEP = """
import subprocess, sys, time
what, mark = sys.argv[1:]
print(what, "begins", flush=True)
open(mark, "a").write(what + "\\n")
if what == "fails":
    sys.exit(3)
if what == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(mark + ".pid", "w").write(str(child.pid))
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        print("was interrupted", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """A stage made of steps, and a day to run it in."""
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mark = tmp_path / "mark"

    def run(*what, limit_s=60.0, card="a card", **more):
        commands = tuple(f"step {word} {shlex.quote(str(mark))}" for word in what)
        stage = Stage("probe", "something", commands, (), "files", "look at it", **more)
        day = Day(tmp_path / "out", code_root(), card, False, limit_s)
        entry = day.run(stage, lambda line: None)
        return SimpleNamespace(entry=entry, stage=stage, log=(day.out / "probe" / "stage.log").read_text())

    return SimpleNamespace(run=run, mark=mark, pid=Path(f"{mark}.pid"))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stage_is_cut_off_at_its_limit_with_all_that_it_started(steps):
    began = time.monotonic()
    ended = steps.run("works", "hangs", "never", limit_s=5.0)
    assert time.monotonic() - began < 30
    assert (ended.entry.status, [ran.code for ran in ended.entry.ran]) == ("cut off", [0, 124])
    assert "at 5 s: step hangs" in ended.entry.said
    assert not alive(int(steps.pid.read_text()))
    assert "was interrupted" in ended.log  # first asked, then killed
    assert exit_code_of([ended.entry]) == 1
    assert "When it fails: look at it." in page([ended.entry], {"probe": ended.stage}, "a card", tiny=False)


def test_the_next_call_takes_up_what_was_left(steps):
    steps.run("works", "hangs", "also", limit_s=4.0)
    assert steps.mark.read_text().split() == ["works", "hangs"]
    assert steps.run("works", "other", "also").entry.status == "done"
    assert steps.mark.read_text().split() == ["works", "hangs", "other", "also"]
    assert steps.run("works", "other", "also").entry.before
    assert steps.mark.read_text().split() == ["works", "hangs", "other", "also"]


def test_what_another_card_did_is_done_anew(steps):
    steps.run("works")
    assert not steps.run("works", card="another").entry.before
    assert steps.mark.read_text().split() == ["works", "works"]


def test_a_command_that_fails_fails_its_stage_and_not_the_next_command(steps):
    ended = steps.run("fails", "works")
    assert ended.entry.status == "failed"
    assert "exit code 3: step fails" in ended.entry.said
    assert "works begins" in ended.log
    assert steps.run("fails", "works").entry.status == "failed"
    assert steps.mark.read_text().split() == ["fails", "works", "fails"]


def test_a_stage_fails_by_what_it_found(steps):
    ended = steps.run("works", check=lambda folder: (False, f"nothing in {folder.name}"))
    assert (ended.entry.status, ended.entry.said) == ("failed", "nothing in probe")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_day_that_is_stopped_stops_its_stage_and_keeps_what_there_is(tmp_path, number):
    argv = [sys.executable, "-m", "cli", "bench", "gpu-day", "--tiny", "--only", "probe", "--out", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(code_root())}
    day = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 60
    while not (tmp_path / "probe" / "stage.log").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    (child,) = Path(f"/proc/{day.pid}/task/{day.pid}/children").read_text().split() or [0]
    day.send_signal(number)
    said = day.communicate(timeout=30)[1]
    assert day.returncode == 130
    assert "run the same command to continue" in said
    assert not alive(child)
    assert read_state(tmp_path)["probe"].status == "cut off"
    assert "## probe: cut off" in (tmp_path / "gpu-day.md").read_text()


def answer(method, tokens, score=1.0, sample="a", status="ok"):
    return SimpleNamespace(length=512, sample=sample, method=method, status=status, score=score, tokens=tokens)


@pytest.mark.parametrize(
    ("fast", "ok", "says"),
    [
        ([answer("full:engine=fast", [1] * 10)], True, "full: 10/10 tokens alike"),
        ([answer("full:engine=fast", [1] * 9 + [2])], True, "full: 9/10 tokens alike"),
        ([answer("full:engine=fast", [1] * 8 + [2, 2])], False, "full: 8/10 tokens alike"),
        ([answer("full:engine=fast", [1] * 8)], False, "full: 8/10 tokens alike"),
        ([answer("full:engine=fast", [1] * 10, score=0.0)], False, "full: 10/10 tokens alike, 1 answers lost"),
        ([answer("full:engine=fast", [1] * 10, status="oom")], False, "full: nothing to compare"),
        ([], False, "full: nothing to compare"),
        ([answer("full:engine=fast", [1] * 10, sample="b")], False, "full: nothing to compare"),
    ],
)
def test_engines_agree_or_not(monkeypatch, tmp_path, fast, ok, says):
    reference = answer("full:engine=reference", [1] * 10)
    monkeypatch.setattr("evals.runs.results.read_run", lambda folder: (None, [reference, *fast]))
    assert engines_agree(tmp_path) == (ok, says)


def test_an_answer_that_one_engine_does_not_have_is_missed(monkeypatch, tmp_path):
    answers = [answer(f"full:engine={engine}", [1], sample=s) for s in "ab" for engine in ("reference", "fast")]
    monkeypatch.setattr("evals.runs.results.read_run", lambda folder: (None, answers[:-1]))
    assert engines_agree(tmp_path) == (False, "full: 1/1 tokens alike, 1 answers missing")


def test_an_answer_of_neither_engine_is_no_agreement(monkeypatch, tmp_path):
    monkeypatch.setattr("evals.runs.results.read_run", lambda folder: (None, [answer("full", [1])]))
    assert engines_agree(tmp_path) == (False, "no answers of two engines")


def test_no_stage_is_longer_than_what_a_lease_allows():
    assert MOST_SECONDS <= 480
    assert all(stage.commands and stage.on_failure and stage.writes for stage in stages().values())
