"""`skv bench` as a user meets it: one line per mistake, sweeps that end well, folders of other machines."""

from __future__ import annotations

import json

import pytest
from test_cli import mistake
from tiny_models import tiny_model

from cli.main import main
from evals.bench.latency.profile import LatencyRecord
from evals.bench.records import BenchRecord
from evals.runs.results import read_records
from shadowkv.contract.registry import parse_method
from shadowkv.models.loading import load_config, load_tokenizer
from shadowkv.models.model_size import model_size
from shadowkv.models.presets import find_preset
from shadowkv.models.resolving import ModelSource, resolve

SMALL = ["--context", "256,512", "--steps", "3", "--warmup", "1", "--haystack", "synthetic"]
METHODS = ["-m", "full", "-m", "shadowkv:rank=8,budget=64", "-m", "quest:budget=64"]


@pytest.fixture
def throughput(tiny_folder, tmp_path):
    """Arguments of a sweep of seconds."""
    out = ["--out", str(tmp_path / "run")]
    return ["bench", "throughput", "--model", str(tiny_folder), *METHODS, *SMALL, *out]


def test_no_step_crosses_a_change_of_frequencies(tmp_path, capsys):
    """Also none of those that only count hits."""
    tokenizer = load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))
    tiny_model("phi3-longrope", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sweep = ["bench", "throughput", "--model", str(tmp_path), "-m", "full", "--batch", "1", "--haystack", "synthetic"]
    sweep += ["--steps", "3", "--warmup", "1", "--repeats", "1", "--out", str(tmp_path / "run"), "-q"]
    capsys.readouterr()  # of saving
    assert "frequencies change beyond 256 tokens" in mistake(capsys, *sweep, "--context", "245")
    assert main([*sweep, "--context", "244"]) == 0


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_both_show_examples(capsys, command):
    assert main(["bench", command, "--help"]) == 0
    assert "Examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--batch", "0"], "a batch must be at least 1, got 0"),
        (["--batch", "4,2,1"], "ascending order; write 1,2,4"),
        (["--batch", "four"], "'four' is not a list of batches"),
        (["--context", "8k"], "beyond this model's context of 4096"),
        (["--context", "long"], "is not a length"),
        (["--context", ","], "for example --context 1k,2k,4k"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--max-batch", "0"], "--max-batch must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--warmup", "-1"], "--warmup must be at least 0"),
        (["--prefill-chunk", "0"], "at least 1"),
        (["--dtype", "float3"], "unknown dtype"),
        (["--engine", "vlm"], "did you mean 'vllm'"),
        (["--kv-bytes", "25%", "--budget", "64"], "--budget and --kv-bytes would each decide"),
        (["--kv-bytes", "0%"], "--kv-bytes 0% is not in (0, 100] %"),
        (["--kv-bytes", "lots"], "--kv-bytes: 'lots' is not a size"),
        (["-m", "tova:budget=64", "--kv-bytes", "25%"], "give that or --kv-bytes"),
        (["--engine", "vllm", "--synthetic-kv"], "so --synthetic-kv is not of it"),
        (["--memory-cap", "much"], "is not a size; write 80GB"),
        (["--memory-cap", "10kB"], "--memory-cap 10kB is less than the weights"),
        (["-m", "shadwkv"], "did you mean 'shadowkv'"),
        (["--hits", "0.6"], "--hits is of made-up keys: add --synthetic-kv"),
        (["--hits", "60", "--synthetic-kv"], "--hits must be from 0 to 1, got 60"),
        (["-m", "full", "-m", "infinigen", "--synthetic-kv"], "hidden states, which --synthetic-kv does not have"),
        (["-m", "shadowkv:energy=0.9", "--synthetic-kv"], "leave out the method or --synthetic-kv"),
        (["-m", "full+minference", "--synthetic-kv"], "leave out the method or --synthetic-kv"),
        (["--haystack", "nowhere.txt"], "cannot be read"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_mistakes_are_one_line(capsys, tiny_folder, argv, says):
    given = [] if "-m" in argv else ["-m", "full"]
    context = [] if "--context" in argv else ["--context", "256"]
    assert says in mistake(capsys, "bench", "throughput", "--model", str(tiny_folder), *given, *context, *argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--batch", "auto"], "--batch auto is of `skv bench throughput`"),
        (["--trace", "x.json", "--batch", "1,2"], "one -m, one --context and one --batch"),
        (["--trace", "nowhere/x.json", "--context", "256"], "is not a folder"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_mistakes_of_latency_are_one_line(capsys, tiny_folder, argv, says):
    assert says in mistake(capsys, "bench", "latency", "--model", str(tiny_folder), "-m", "full", *argv)


def test_vllm_says_how(capsys, tiny_folder):
    pytest.importorskip("torch")
    import importlib.util

    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    assert "pip install vllm" in mistake(capsys, "bench", "throughput", "--model", str(tiny_folder), "--engine", "vllm")


def test_a_sweep_prints_writes_and_continues(capsys, throughput, tmp_path):
    argv = [*throughput, "--batch", "1,2", "--repeats", "2", "--engine", "hf"]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "Best batch" in said.out
    assert "tokens/s" in said.out
    assert "noise before each: load per core" in said.out
    run = tmp_path / "run"
    _, records = read_records(run, BenchRecord)
    assert len(records) == 4 * 2 * 2 * 2
    assert {r.method for r in records} == {"full", "shadowkv:budget=64,rank=8", "quest:budget=64", "full@hf"}
    drawn = {f"{name}.{kind}" for name in ("throughput", "gain", "memory") for kind in ("png", "svg")}
    assert {p.name for p in (run / "plots").iterdir()} == drawn
    assert r"\begin{tabular}" in (run / "summary.tex").read_text()
    before = (run / "throughput.jsonl").read_bytes()
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (run / "throughput.jsonl").read_bytes() == before, "nothing was measured again"
    assert len(told["rows"]) == 4 * 2 * 2
    assert {row["status"] for row in told["rows"]} == {"ok"}
    assert {gain["method"] for gain in told["gains"]} == {r.method for r in records}
    assert all(gain["gain"]["low"] <= gain["gain"]["median"] <= gain["gain"]["high"] for gain in told["gains"])
    grown = [word if word != "1,2" else "1,2,3" for word in argv]
    assert main([*grown, "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert (run / "throughput.jsonl").read_bytes().startswith(before)
    other = [word if word != "3" else "4" for word in argv]
    assert "steps: 3 -> 4" in mistake(capsys, *other)


def test_a_tiny_cap_is_an_oom_and_no_failure(capsys, throughput, tiny_folder):
    weights = model_size(load_config(resolve(str(tiny_folder), dummy=False)), 4, device="cpu").weight_bytes
    assert main([*throughput, "--batch", "1,2,4", "--memory-cap", f"{weights + 1_600_000}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = {(row["method"], row["context"], row["batch"]): row["status"] for row in told["rows"]}
    assert "oom" in found.values()
    for method in {name for name, _, _ in found}:
        statuses = [found.get((method, 512, batch)) for batch in (1, 2, 4)]
        assert statuses in (["ok", "ok", "ok"], ["ok", "ok", "oom"], ["ok", "oom", None], ["oom", None, None])
    assert any(note.startswith("device memory capped at") for note in told["notes"])
    assert any(note.startswith("oom: full @ 512") for note in told["notes"])


def test_methods_are_given_the_same_device_memory(capsys, tiny_folder, tmp_path):
    """A quarter of what full attention takes of the longest prompt; what is fixed runs as it is and is named."""
    argv = ["bench", "throughput", "--model", str(tiny_folder), *SMALL, "--batch", "1", "--repeats", "1"]
    asked = ["-m", "full", "-m", "shadowkv:budget=64", "-m", "snapkv", "-m", "streaming", "--kv-bytes", "25%"]
    assert main([*argv, *asked, "--json", "--out", str(tmp_path / "run")]) == 0
    told = json.loads(capsys.readouterr().out)
    chosen = [parse_method(label) for label in dict.fromkeys(row["method"] for row in told["rows"])]
    dims = model_size(load_config(resolve(str(tiny_folder), dummy=False)), 4, device="cpu").dims
    full, *others = (method.prompt_bytes(dims, 512).device for method in chosen)
    assert [method.name for method in chosen] == ["full", "shadowkv", "snapkv", "streaming"]
    assert all(0.2 * full < held <= 0.25 * full for held in others)
    assert "--kv-bytes 25% does not apply to full, which run as they are" in told["notes"]


def test_a_search_that_ends_at_its_ceiling_says_so(capsys, throughput):
    argv = [*throughput, "--find-max-batch", "--max-batch", "3", "--repeats", "1", "--context", "256", "--json"]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["batch"] for row in told["rows"]} == {3}
    assert "the search ended at --max-batch 3: quest:budget=64 @ 256" in told["notes"]


def test_host_memory_that_is_short_is_refused_at_once(capsys, throughput, monkeypatch):
    monkeypatch.setattr("evals.bench.memory.available_host_bytes", lambda: 2**10)
    said = mistake(capsys, *throughput, "--batch", "1")
    assert "full @ 256 x 1 needs" in said
    assert "1.0 KiB" in said or "0.0 MiB are available" in said


def test_a_folder_of_another_machine_is_refused_but_with_force(capsys, throughput, tmp_path):
    argv = [*throughput, "--batch", "1", "--repeats", "1"]
    assert main([*argv, "-q"]) == 0
    run = tmp_path / "run"
    machine = json.dumps(read_records(run, BenchRecord)[1][0].machine)
    for name in ("run.json", "throughput.jsonl"):
        (run / name).write_text((run / name).read_text().replace(machine, '"a supercomputer"'))
    assert "holds times of another machine (a supercomputer)" in mistake(capsys, *argv)
    more = [*throughput, "--batch", "1,2", "--repeats", "1"]
    assert main([*more, "--force", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert any(note.startswith("measured on several machines") and "supercomputer" in note for note in told["notes"])
    assert "measured on several machines" in (run / "summary.md").read_text()


def test_a_dry_run_plans_and_runs_nothing(capsys, throughput, tmp_path):
    assert main([*throughput, "--dry-run", "--json", "--find-max-batch", "--max-batch", "7"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["largest_batch"] for row in told["rows"]] == [7] * 6
    assert all(row["device_bytes"] > 0 for row in told["rows"])
    assert not (tmp_path / "run").exists()
    assert main([*throughput, "--dry-run"]) == 0
    assert "Nothing was run" in capsys.readouterr().out


def test_synthetic_and_dummy_runs_say_so_everywhere(capsys, tmp_path):
    argv = ["bench", "throughput", "--model", "smollm2-135m", "--dummy", "--synthetic-kv", "--context", "256"]
    argv += ["--steps", "2", "--warmup", "0", "--batch", "1", "--repeats", "1", "-m", "full", "-m", "quest:budget=64"]
    argv += ["--hits", "0.6"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for said in (out, *((tmp_path / name).read_text() for name in ("summary.md", "summary.tex", "run.json"))):
        assert "dummy weights" in said
        assert "synthetic KV" in said
        assert "building them leaves out the fit" in " ".join(said.split())
        assert "hits made" in said
    assert "synthetic_kv" in (tmp_path / "summary.csv").read_text().splitlines()[0]


def test_sets_leave_out_what_cannot_be_made_up(capsys, tiny_folder, tmp_path):
    argv = ["bench", "throughput", "--model", str(tiny_folder), "-m", "@retrieval", "--synthetic-kv", *SMALL[2:]]
    assert main([*argv, "--context", "256", "--batch", "1", "--repeats", "1", "--out", str(tmp_path), "-q"]) == 1
    assert "unsupported: infinigen" in capsys.readouterr().err
    assert "infinigen" not in {r.method.partition(":")[0] for r in read_records(tmp_path, BenchRecord)[1]}


def test_latency_shows_parts_and_writes_a_trace(capsys, tiny_folder, tmp_path):
    argv = ["bench", "latency", "--model", str(tiny_folder), *SMALL[2:], "--out", str(tmp_path / "run")]
    assert main([*argv, *METHODS, "--context", "256", "--batch", "1,2"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("selection", "attention", "projections", "MLP", "slowed"))
    assert len(read_records(tmp_path / "run", LatencyRecord)[1]) == 6
    assert (tmp_path / "run" / "plots" / "latency.png").is_file()
    trace = tmp_path / "step.json"
    one = [*argv[:-1], str(tmp_path / "one"), "-m", "quest:budget=64", "--context", "256", "--trace", str(trace)]
    for _ in range(2):  # also where the record is there already
        trace.unlink(missing_ok=True)
        assert main([*one, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["rows"][0]["parts_ms"]["selection"] > 0
        assert any(event.get("name") == "skv::selection" for event in json.loads(trace.read_text())["traceEvents"])
