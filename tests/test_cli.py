"""The command line as a user meets it: one line per mistake, honest exit codes, clean stdout."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from tiny_models import tiny_model

from cli.main import main
from evals.runs.results import read_run
from shadowkv.contract.registry import methods
from shadowkv.models.loading import load_tokenizer
from shadowkv.models.presets import find_preset, presets
from shadowkv.models.resolving import ModelSource

SMALL = ["--lengths", "512,768", "--depths", "3", "--haystack", "synthetic", "--max-new-tokens", "6"]
METHODS = ["-m", "full", "-m", "shadowkv:rank=8,budget=64", "-m", "quest:budget=64"]


@pytest.fixture
def niah(tiny_folder, tmp_path):
    """Arguments of a run of seconds."""
    return ["eval", "niah", "--model", str(tiny_folder), *METHODS, *SMALL, "--out", str(tmp_path / "run")]


def mistake(capsys, *argv):
    """The one line that a user gets for it."""
    assert main(list(argv)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("skv: ")
    assert said.err.count("\n") == 1
    return said.err


def test_help_is_fast_and_light():
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "from cli.main import main\n"
        "main(['--help']); main(['eval', 'niah', '--help'])\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


COMMANDS = [["eval", "niah"], ["eval", "ruler"], ["eval", "longbench"], ["data", "ruler"]]


@pytest.mark.parametrize("command", [*COMMANDS, ["plan"], ["models"], ["methods"], ["pull"]])
def test_every_command_shows_examples(capsys, command):
    assert main([*command, "--help"]) == 0
    assert "Examples:" in capsys.readouterr().out


def test_version_tells_where_the_packages_are(capsys):
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in ("cli", "evals", "shadowkv"))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model", "llama31-8b"], "did you mean 'llama3.1-8b'"),
        (["--model", "no/such/model/here"], "unknown model"),
        (["--model", "nothing.gguf"], "no such file"),
        (["--model", "TINY", "-m", "shadwkv"], "did you mean 'shadowkv'"),
        (["--model", "TINY", "-m", "quest:bugdet=4"], "did you mean 'budget'"),
        (["--model", "TINY", "-m", "shadowkv:rank=4000"], "exceeds the width of this model's keys, 32"),
        (["--model", "TINY", "-m", "shadowkv:budget=1"], "smaller than one chunk"),
        (["--model", "TINY", "--lengths", "8k"], "beyond this model's context of 4096"),
        (["--model", "TINY", "--lengths", "many"], "is not a length"),
        (["--model", "TINY", "--depths", "1,200"], "outside 0 to 100"),
        (["--model", "TINY", "--protocol", "magic"], "did you mean 'magic-number'"),
        (["--model", "TINY", "--rounds", "0"], "at least 1"),
        (["--model", "TINY", "--haystack", "nowhere.txt"], "cannot be read"),
        (["--model", "TINY", "--device", "cuda", "--haystack", "synthetic"], "no CUDA device"),
        (["--model", "TINY", "--device", "gpu9"], "unknown device"),
        (["--model", "TINY", "--dtype", "float3"], "unknown dtype"),
        (["--model", "TINY", "--prefill-chunk", "0"], "at least 1"),
        (["--model", "TINY", "--frobnicate"], "No such option"),
    ],
)
def test_mistakes_are_one_line(capsys, tiny_folder, monkeypatch, argv, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "cuda" in argv:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    assert says in mistake(capsys, "eval", "niah", *[str(tiny_folder) if a == "TINY" else a for a in argv])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["ruler", "--tasks", "niah_singel_1"], "did you mean 'niah_single_1'"),
        (["ruler", "--lengths", "256", "--tasks", "cwe"], "too short for cwe"),
        (["ruler", "--lengths", "8k"], "beyond this model's context of 4096"),
        (["ruler", "--samples", "0"], "at least 1"),
        (["ruler", "--samples", "99999", "--tasks", "qa_1"], "more than the 960 questions of qa_1"),
        (["ruler", "--profile", "nvdia"], "did you mean 'nvidia'"),
        (["ruler", "--wording", "onw"], "did you mean 'own'"),
        (["ruler", "--data", "nowhere"], "is not a folder"),
        (["ruler", "--haystack", "nowhere.txt"], "cannot be read"),
        (["ruler", "--data", "nowhere", "--seed", "3"], "do nothing with --data"),
        (["ruler", "--wrap-data"], "does nothing without --data"),
        (["ruler", "--lengths", "100", "--tasks", "qa_1"], "holds 0 questions of qa_1; use a longer one"),
        (["longbench", "--v2", "--e"], "do nothing with --v2"),
        (["longbench", "--v2", "--max-prompt-tokens", "1"], "at least 2"),
        (["longbench", "--tasks", "hotptqa"], "did you mean 'hotpotqa'"),
        (["longbench", "--data", "nowhere"], "does not exist"),
        (["longbench", "--e", "--tasks", "vcsum"], "LongBench-E has no vcsum"),
        (["longbench", "--max-prompt-tokens", "4000"], "no room for template and answer"),
        (["longbench", "--samples", "0"], "at least 1"),
        (["longbench", "--v2", "--data", "nowhere.json"], "cannot be read"),
    ],
)
def test_mistakes_of_ruler_and_longbench_are_one_line(capsys, tiny_folder, argv, says):
    wording = [] if {"--wording", "--v2"} & {*argv} or argv[:2] == ["ruler", "--data"] else ["--wording", "own"]
    assert says in mistake(capsys, "eval", argv[0], "--model", str(tiny_folder), *wording, *argv[1:])


@pytest.mark.parametrize("benchmark", ["ruler", "longbench"])
def test_a_missing_pack_names_the_command(capsys, tiny_folder, monkeypatch, tmp_path, benchmark):
    monkeypatch.setenv("SKV_HOME", str(tmp_path))
    data = ["--data", str(tmp_path)] if benchmark == "longbench" else ["--tasks", "vt"]
    (tmp_path / "lcc.jsonl").write_text("{}")
    extra = ["--tasks", "lcc"] if benchmark == "longbench" else []
    said = mistake(capsys, "eval", benchmark, "--model", str(tiny_folder), *data, *extra)
    assert f"skv pull {benchmark}" in said


def test_ruler_runs_shows_its_tables_and_reads_back_what_it_wrote(capsys, tiny_folder, tmp_path):
    """A byte is a token of the tiny model, so few tasks fit into its 4096."""
    tasks = ["--tasks", "niah_single_1,niah_multikey_1,fwe", "--lengths", "2k,3k", "--samples", "2", "--wording", "own"]
    argv = ["eval", "ruler", "--model", str(tiny_folder), "-m", "full", "-m", "quest:budget=64"]
    assert main([*argv, *tasks, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "RULER, percent by task" in said
    assert "Effective length" in said
    assert "not comparable with published scores" in said
    records = read_run(tmp_path / "run")[1]
    assert len(records) == 3 * 2 * 2 * 2
    plots = ("score_by_bytes", "score_by_length", "tasks_2048", "tasks_3072")
    drawn = {f"{name}.{kind}" for name in plots for kind in ("png", "svg")}
    assert {p.name for p in (tmp_path / "run" / "plots").iterdir()} == drawn
    grown = [word if word != "2" else "3" for word in tasks]
    assert main([*argv, *grown, "--out", str(tmp_path / "run"), "-q"]) == 0
    assert len(read_run(tmp_path / "run")[1]) == 3 * 2 * 3 * 2
    assert read_run(tmp_path / "run")[1][: len(records)] == records
    assert main(["data", "ruler", "--model", str(tiny_folder), *tasks, "--out", str(tmp_path / "prompts")]) == 0
    assert main([*argv, "--data", str(tmp_path / "prompts"), "--out", str(tmp_path / "again"), "-q"]) == 0
    again = read_run(tmp_path / "again")[1]
    assert sorted(r.prompt_sha256 for r in again) == sorted(r.prompt_sha256 for r in records)


def test_a_ruler_task_that_cannot_fill_a_length_is_named_and_the_others_run(capsys, tiny_folder, tmp_path, monkeypatch):
    from evals.ruler.own_materials import OwnMaterials

    monkeypatch.setattr(OwnMaterials, "words", lambda self, kind: [f"{kind}{i}" for i in range(10)])
    argv = ["--model", str(tiny_folder), "--tasks", "cwe,fwe", "--lengths", "3k", "--samples", "1", "--wording", "own"]
    left_out = "left out: cwe at 3072: its 30 words do not fill that length"
    assert main(["eval", "ruler", *argv, "-m", "full", "--out", str(tmp_path / "run")]) == 1
    assert f"skv: {left_out}" in capsys.readouterr().err
    manifest, records = read_run(tmp_path / "run")
    assert [r.task for r in records] == ["fwe"]
    assert left_out in manifest.notes
    assert main(["data", "ruler", *argv, "--out", str(tmp_path / "prompts")]) == 1
    assert f"skv: {left_out}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "prompts" / "3072").iterdir()] == ["fwe"]


def test_unknown_commands_and_packs_are_one_line(capsys):
    assert "No such command" in mistake(capsys, "evla")
    assert "did you mean 'essays'" in mistake(capsys, "pull", "esays")


def test_debug_shows_the_traceback_wherever_it_stands():
    from shadowkv.common.errors import SkvError

    for argv in (["--debug", "pull", "esays"], ["pull", "esays", "--debug"]):
        with pytest.raises(SkvError):
            main(argv)


def methods_of_plan(capsys, *argv):
    assert main([*argv, "--dry-run", "--json"]) == 0
    return list(json.loads(capsys.readouterr().out)["methods"])


def test_sets_name_many_methods_with_parameters_that_fit_the_model(capsys, tiny_folder):
    argv = ["eval", "niah", "--model", str(tiny_folder), "--haystack", "synthetic", "--lengths", "512", "--depths", "1"]
    paper = methods_of_plan(capsys, *argv, "-m", "@paper")
    assert [label.partition(":")[0] for label in paper] == [
        "full", "shadowkv", "quest", "infinigen", "loki", "snapkv", "streaming",
    ]  # fmt: skip
    assert "shadowkv:rank=32" in paper
    assert "did you mean '@paper'" in mistake(capsys, *argv, "-m", "@papr")
    preset = [*argv[:2], "--model", "smollm2-135m", "--dummy", *argv[4:]]
    assert "shadowkv:budget=256,rank=64" in methods_of_plan(capsys, *preset, "-m", "@paper")


def test_all_lists_kivi_in_2_and_4_bits_unless_bytes_decide(capsys):
    argv = ["eval", "niah", "--model", "smollm2-135m", "--dummy", "--haystack", "synthetic", "--lengths", "512"]

    def kivi(*option):
        return [m for m in methods_of_plan(capsys, *argv, "-m", "all", *option) if m.startswith("kivi")]

    assert kivi() == kivi("--budget", "128,256") == ["kivi", "kivi:bits=4"]
    for share, label in (("40%", "kivi:bits=8"), ("30%", "kivi:bits=4"), ("23%", "kivi")):
        assert kivi("--kv-bytes", share) == [label]
    assert kivi("--kv-bytes", "40%,30%") == ["kivi:bits=8", "kivi:bits=4"]
    capsys.readouterr()
    assert main([*argv, "-m", "all", "--kv-bytes", "20%", "--dry-run"]) == 0
    assert capsys.readouterr().err.count("unsupported: kivi") == 1
    assert "has a bits of its own" in mistake(capsys, *argv, "-m", "kivi:bits=4", "--kv-bytes", "55%")


def test_one_budget_is_given_to_every_method_that_chooses(capsys, tiny_folder):
    argv = ["eval", "niah", "--model", str(tiny_folder), "--haystack", "synthetic", "--lengths", "512", "--depths", "1"]
    chosen = ["-m", "full", "-m", "quest", "-m", "shadowkv:rank=8", "-m", "kivi:group=16"]
    assert methods_of_plan(capsys, *argv, *chosen, "--budget", "128,256") == [
        "full", "quest:budget=128", "quest:budget=256", "shadowkv:budget=72,rank=8", "shadowkv:budget=184,rank=8",
        "kivi:group=16",
    ]  # fmt: skip
    assert "has a budget of its own" in mistake(capsys, *argv, "-m", "quest:budget=64", "--budget", "128")
    assert "is not a budget" in mistake(capsys, *argv, "--budget", "many")


def test_kv_bytes_are_given_to_every_method_that_can_choose_them(capsys, tiny_folder):
    argv = ["eval", "niah", "--model", str(tiny_folder), "--haystack", "synthetic", "--lengths", "512"]
    chosen = ["-m", "full", "-m", "quest:budget=64", "-m", "snapkv:window=8", "-m", "streaming"]
    assert methods_of_plan(capsys, *argv, *chosen, "--kv-bytes", "50%,25%") == [
        "full", "quest:budget=64", "snapkv:budget=256,window=8", "snapkv:budget=128,window=8",
        "streaming:budget=256", "streaming:budget=128",
    ]  # fmt: skip
    for given, said in (("0%", "not in (0, 100] %"), ("lots", "is not a size"), ("1B", "more than")):
        assert said in mistake(capsys, *argv, "-m", "tova", "--kv-bytes", given)
    assert "budget of its own" in mistake(capsys, *argv, "-m", "tova:budget=9", "--kv-bytes", "50%")
    assert "give one of them" in mistake(capsys, *argv, "--kv-bytes", "50%", "--budget", "64")


def test_a_method_that_cannot_run_here_is_named_and_the_others_run(capsys, tiny_folder, tmp_path):
    argv = ["eval", "niah", "--model", str(tiny_folder), "--haystack", "synthetic", "--lengths", "512", "--depths", "1"]
    argv += ["-m", "full", "-m", "shadowkv:rank=4000", "--out", str(tmp_path / "run")]
    assert main(argv) == 1
    assert "skv: unsupported: shadowkv:rank=4000: shadowkv: rank=4000 exceeds" in capsys.readouterr().err
    assert {r.method for r in read_run(tmp_path / "run")[1]} == {"full"}


def test_tables_show_what_a_method_reads_and_moves(capsys, niah, tmp_path):
    assert main(niah) == 0
    said = capsys.readouterr().out
    assert "tokens" in said
    assert "bus KiB" in said
    by_method = {r.method: r for r in read_run(tmp_path / "run")[1] if r.length == 768}
    assert by_method["full"].attended_tokens == by_method["full"].prompt_tokens
    assert by_method["quest:budget=64"].attended_tokens < by_method["full"].attended_tokens
    assert by_method["shadowkv:budget=64,rank=8"].bus_bytes > 0 == by_method["full"].bus_bytes


def test_a_run_writes_everything_and_prints_a_table(capsys, niah, tmp_path):
    assert main(niah) == 0
    said = capsys.readouterr()
    assert "shadowkv:budget=64,rank=8" in said.out
    assert "not comparable with published scores" in said.out
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {"run.json", "samples.jsonl", "summary.csv", "summary.md", "plots"}
    assert (run / "plots" / "heatmap.png").stat().st_size > 1000
    assert "not comparable with published scores" in (run / "summary.md").read_text()
    assert "not comparable with published scores" in (run / "summary.csv").read_text()
    manifest, records = read_run(run)
    assert len(records) == 2 * 3 * 3
    assert all(r.status == "ok" and r.score in (0.0, 1.0) for r in records)
    assert manifest.sessions[0].versions["torch"]
    assert manifest.sources["haystack"]["sha256"]
    assert any(r.reused_tokens for r in records)


def test_running_again_adds_nothing_and_says_the_same(capsys, niah, tmp_path):
    assert main([*niah, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert main([*niah, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before


def test_json_is_all_there_is_on_stdout(niah):
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *niah, "--json"], capture_output=True, text=True, check=True
    )
    summary = json.loads(done.stdout)
    assert {row["method"] for row in summary["rows"]} == {"full", "shadowkv:budget=64,rank=8", "quest:budget=64"}
    assert done.stderr == ""


def test_quiet_is_quiet(capsys, niah):
    assert main([*niah, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_dry_run_tells_and_touches_nothing(capsys, niah, tmp_path, extra):
    assert main([*niah, "--dry-run", *extra]) == 0
    said = capsys.readouterr().out
    assert ("depth=50,round=0" if extra else "magic-number") in said
    assert not (tmp_path / "run").exists()
    if extra:
        plan = json.loads(said)
        assert plan["answers"] == 18
        assert plan["methods"]["full"]["device_bytes"] > plan["methods"]["shadowkv:budget=64,rank=8"]["device_bytes"]


def test_prompts_beyond_the_context_can_be_made_but_not_run(capsys, tiny_folder):
    argv = ["eval", "ruler", "--model", str(tiny_folder), "--lengths", "8k", "--tasks", "vt", "--wording", "own"]
    assert "beyond this model's context of 4096" in mistake(capsys, *argv)
    assert main([*argv, "--samples", "1", "--dry-run"]) == 0
    assert "cannot be run" in capsys.readouterr().err


def test_dry_run_plans_for_budgets_and_for_the_queries_that_a_method_needs(capsys, niah):
    def plan(*more):
        assert main([*niah, "--dry-run", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    plain, observing = plan("-m", "snapkv:budget=64"), plan("-m", "snapkv:budget=64", "-m", "h2o:budget=64")
    longest = max(example["prompt_tokens"] for example in plain["examples"])
    per_token = plain["methods"]["full"]["device_bytes"] // longest
    assert plain["methods"]["snapkv:budget=64"]["device_bytes"] == 64 * per_token
    assert plain["prefill_kv_bytes"] == longest * per_token
    assert observing["prefill_kv_bytes"] == 2 * plain["prefill_kv_bytes"]  # two query heads per KV head
    assert main([*niah, "-q", "-m", "h2o:budget=64"]) == 0


def test_predictions_are_the_same_without_prefix_reuse(niah, tmp_path, capsys):
    assert main([*niah, "-q"]) == 0
    other = [*niah[:-1], str(tmp_path / "fresh"), "--no-prefix-reuse", "-q"]
    assert main(other) == 0
    kept, fresh = ({r.key: (r.tokens, r.score) for r in read_run(tmp_path / name)[1]} for name in ("run", "fresh"))
    assert kept == fresh


def test_streamed_prompts_give_the_same_answers_without_a_prefill(niah, tmp_path, capsys, monkeypatch):
    asked = [*niah[:-2], "-q", "--turns", "2", "--first-query-in-prefill"]
    for spec in ("h2o:budget=64", "xkv:rank_k=16,rank_v=16", "full+minference:vertical=8,slash=8"):
        asked += ["-m", spec]
    kept, streamed = tmp_path / "kept", tmp_path / "streamed"
    assert main([*asked, "--out", str(kept)]) == 0
    with monkeypatch.context() as patched:
        patched.setattr("shadowkv.engine.engine.Engine.prefill", lambda *args: pytest.fail("a dense prompt"))
        assert main([*asked, "--out", str(streamed), "--stream"]) == 0
    (_, before), (manifest, after) = read_run(kept), read_run(streamed)
    assert len(before) == len(after) > 0
    predictions = [{r.key: (r.tokens, r.score, r.device_bytes) for r in records} for records in (before, after)]
    assert predictions[0] == predictions[1]
    assert all(r.reused_tokens == 0 and r.prefill_s > 0 for r in after)
    assert after[0].build_s < after[0].prefill_s / 10, "its cache was built while it was computed"
    assert manifest.config["streamed"] is True
    assert "computed for each method anew" in (streamed / "summary.md").read_text()
    assert main(["compare", str(kept), str(streamed)]) == 0
    assert "not compare" not in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_a_model_of_windows_alone_is_planned_as_it_is_run(tmp_path, capsys, more):
    tokenizer = load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))
    tiny_model("mistral-sliding", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = ["eval", "niah", "--model", str(tmp_path), "-m", "full", *SMALL, *more]
    assert main([*asked, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights_bytes"] > 0
    assert main([*asked, "-q", "--out", str(tmp_path / "run")]) == 0


def test_a_streamed_prompt_takes_two_layers(capsys, niah):
    plans = []
    for more in ([], ["--stream"]):
        assert main([*niah, "--dry-run", "--json", *more]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    longest = max(example["prompt_tokens"] for example in plans[0]["examples"])
    entering = 2 * longest * 64 * 4  # 64 channels in fp32, and their embeddings
    assert plans[1]["prefill_kv_bytes"] == plans[0]["prefill_kv_bytes"] * 2 // 3 + entering
    assert "--stream keeps none" in mistake(capsys, *niah, "--stream", "--diagnostics")


def test_dummy_weights_are_said_in_every_table(capsys, niah, tmp_path):
    assert main([*niah, "--dummy"]) == 0
    assert "dummy weights" in capsys.readouterr().out
    assert "dummy weights" in (tmp_path / "run" / "summary.md").read_text()
    assert "dummy weights" in (tmp_path / "run" / "summary.csv").read_text()


def test_a_folder_of_another_seed_is_refused(capsys, niah):
    assert main([*niah, "-q"]) == 0
    assert "seed: 0 -> 5" in mistake(capsys, *niah, "--seed", "5")


def test_unscored_answers_exit_with_one(capsys, niah, monkeypatch):
    from shadowkv.methods.quest.method import Quest

    def broken(self, rope):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Quest, "new_state", broken)
    assert main(niah) == 1
    assert "unscored: quest:budget=64 @ 512 magic-number depth=0,round=0: out of luck" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*niah, "-q"]) == 0  # what failed is tried again, the rest is kept


def test_model_output_cannot_speak_to_the_terminal():
    from cli.shared.render import safe

    assert safe("a\x1b[31mred\r\n[bold]b[/bold]\u202ex") == "a [31mred \\[bold]b\\[/bold] x"


def test_an_interrupted_run_continues(niah, tmp_path):
    samples = tmp_path / "run" / "samples.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "cli.main", *niah, "-q"], stderr=subprocess.PIPE)
    while process.poll() is None and not (samples.exists() and samples.stat().st_size > 2000):
        time.sleep(0.01)
    process.send_signal(2)
    _, said = process.communicate(timeout=60)
    if process.returncode == 130:
        assert said.decode().strip() == "skv: interrupted; run the same command to continue"
    else:
        assert process.returncode == 0  # it was done before the signal came
    assert main([*niah, "-q"]) == 0
    assert len(read_run(tmp_path / "run")[1]) == 18


def test_lists_are_json_for_scripts(capsys):
    assert main(["methods", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)] == list(methods())
    assert main(["models", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)] == list(presets())
    assert main(["methods"]) == 0
    assert main(["models"]) == 0
    assert main(["pull"]) == 0


@pytest.mark.parametrize(
    ("command", "names"),
    [(["models"], presets), (["methods"], methods), ([], lambda: ["full", "quest:budget=64"])],
)
def test_names_stay_whole_on_a_narrow_terminal(capsys, niah, monkeypatch, command, names):
    """80 columns are what a new terminal has: what a row is about must be readable, and copyable, there."""
    from rich.console import Console

    from cli.shared import render

    monkeypatch.setattr(render, "console", lambda *, stderr=False: Console(stderr=stderr, width=80))
    assert main(command or niah) == 0
    said = capsys.readouterr().out
    assert {*names()} <= {line.split()[0] for line in said.splitlines() if line.strip()}
    table = [line for line in said.splitlines() if "samples.jsonl" not in line]  # paths are printed whole
    assert max(map(len, table)) <= 80


def test_a_reader_that_goes_away_is_no_failure_of_the_run():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m cli.main models | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr


def test_an_output_folder_that_cannot_be_made_is_refused_before_the_model_is_loaded(capsys, niah, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is not a folder" in mistake(capsys, *niah[:-1], str(tmp_path / "file" / "run"))
