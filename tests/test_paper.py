"""Experiments by name: their commands are ones that `skv` takes, and their figures show what was run."""

from __future__ import annotations

import json
from shutil import copytree

import pytest
import typer.main

from cli.main import app, main
from cli.paper import _report
from evals.paper.figures import _published, ablated, accuracy_summary, throughput_summary, write_ablations
from evals.paper.published import ROWS
from evals.paper.recipes import ABLATION_BASE, MODELS, SCALES, SMOKE_MODEL, Step, find_recipe, recipes
from evals.runs.results import read_run
from evals.tables.summary import summarise
from shadowkv.contract.registry import parse_method
from shadowkv.models.presets import presets


def commands(name, scale):
    return [step.words for step in find_recipe(name).steps(scale, (SMOKE_MODEL,) if scale == "smoke" else MODELS)]


def parsed(words):
    """The options of a command as typer reads them; fails on any that it does not know."""
    command, context = typer.main.get_command(app), None
    words = list(words)
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.commands[name]
    context = command.make_context("skv", words)
    return context.params


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", recipes())
def test_every_command_is_one_that_skv_takes(name, scale):
    for words in commands(name, scale):
        params = parsed([*words, "--out", "somewhere"])
        assert params["model"] in presets()
        for spec in params["methods"]:
            parse_method(spec)


@pytest.mark.parametrize("name", recipes())
def test_run_folders_of_an_experiment_are_apart(name):
    folders = [step.folder for step in find_recipe(name).steps("full", (*MODELS, "org/model"))]
    assert len(set(folders)) == len(folders)
    assert not any("/" in folder for folder in folders)


def test_throughput_at_full_scale_is_the_published_table():
    asked = {
        (params["model"], params["context"], params["methods"][1])
        for params in map(parsed, commands("throughput", "full"))
        if params["model"] in {row.model for row in ROWS}
    }
    assert asked == {(r.model, f"{r.context // 1024}k", f"shadowkv:budget={r.budget},rank=160") for r in ROWS}


@pytest.mark.parametrize("scale", SCALES)
def test_ablations_change_one_parameter_at_a_time(scale):
    _, base, *others = parsed(commands("ablations", scale)[0])["methods"]
    assert base == ABLATION_BASE[scale]
    reference = parse_method(base).params()
    changed = [{k for k, v in parse_method(spec).params().items() if v != reference[k]} for spec in others]
    assert all(len(keys) == 1 for keys in changed)
    assert set().union(*changed) == {"budget", "chunk", "rank", "outliers"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_folder):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    base = "shadowkv:budget=64,rank=8"
    settings = ["full", base, f"{base},chunk=4", f"{base},outliers=0", "shadowkv:budget=32,rank=8", "quest:budget=64"]
    methods = [word for spec in settings for word in ("-m", spec)]
    argv = ["eval", "niah", "--model", str(tiny_folder), "--haystack", "synthetic", "--lengths", "512", "--depths", "2"]
    assert main([*argv, *methods, "-q", "--out", str(out)]) == 0
    return out


def test_settings_are_sorted_by_the_parameter_that_was_changed(run_folder):
    rows = {row.method: row for row in summarise(read_run(run_folder)[1])}
    panels = ablated("shadowkv:budget=64,rank=8", rows)
    assert {key: sorted(points) for key, points in panels.items()} == {
        "chunk": [4, 8], "outliers": [0, 2], "budget": [32, 64],
    }  # fmt: skip
    assert all(points[{"chunk": 8, "outliers": 2, "budget": 64}[key]] == rows["shadowkv:budget=64,rank=8"]
               for key, points in panels.items())  # fmt: skip
    assert write_ablations(run_folder / "plots" / "a.png", run_folder, "shadowkv:budget=64,rank=8").stat().st_size


def test_scores_of_all_models_stand_in_one_table(run_folder):
    table = accuracy_summary([run_folder])
    assert [row[3] for row in table.rows][:2] == ["full", "shadowkv:budget=64,rank=8"]
    assert {row[0] for row in table.rows} == {"tiny-llama"}
    assert all(row[-1] == "2/2" for row in table.rows)


def test_gains_stand_beside_the_published_ones(tmp_path, tiny_folder):
    out = tmp_path / "sweep"
    argv = ["bench", "throughput", "--model", str(tiny_folder), "--haystack", "synthetic", "--context", "256"]
    more = ["--batch", "1", "--repeats", "1", "--steps", "2", "--warmup", "1", "-m", "full", "-m", "quest:budget=64"]
    assert main([*argv, *more, "--quiet", "--out", str(out)]) == 0
    rows = throughput_summary([out]).rows
    assert [row[:3] for row in rows] == [["tiny-llama", "256", "quest:budget=64"]]
    assert rows[0][-1] == "–", "nothing was published for this model"


def test_a_gain_was_published_for_one_setting_only():
    for method, said in (
        ("shadowkv:budget=1024", "2.94"),
        ("shadowkv:budget=2048", "–"),
        ("shadowkv", "–"),
        ("shadowkv:budget=1024,rank=64", "–"),
        ("quest:budget=1024", "–"),
    ):
        assert _published("llama3.1-8b", 60 * 1024, method) == said
    assert _published("llama3.1-8b", 122 * 1024, "shadowkv") == "3.04"


def test_a_smoke_run_says_what_it_is_and_what_its_runs_say(capsys, run_folder, tmp_path):
    """From folders as the commands leave them: everything is measured already."""
    out = tmp_path / "paper"
    copytree(run_folder, out / "tiny")
    told = json.loads((out / "tiny" / "run.json").read_text())
    (out / "tiny" / "run.json").write_text(json.dumps({**told, "notes": ["left out: cwe"]}))
    _report(find_recipe("niah"), "smoke", out, [Step("tiny", ())])
    page = (out / "paper.md").read_text()
    for said in (page, " ".join(capsys.readouterr().out.split())):
        assert "nothing of the paper's claims" in said
        assert "tiny: left out: cwe" in said


def test_longbench_without_some_rows_names_them(capsys, tmp_path, tiny_folder):
    (tmp_path / "data").mkdir()
    row = {"input": "q", "context": "text " * 50, "answers": ["a"], "length": 50, "all_classes": None, "_id": "1"}
    (tmp_path / "data" / "trec.jsonl").write_text(json.dumps({**row, "all_classes": ["a", "b"]}) + "\n")
    words = [word for step in find_recipe("longbench").steps("smoke", [str(tiny_folder)]) for word in step.words]
    argv = [*words, "--data", str(tmp_path / "data"), "--wording", "own", "--out", str(tmp_path / "run"), "-q"]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "left out: " in said
    assert "multi_news" in said
    assert "no rows" in said
    notes = read_run(tmp_path / "run")[0].notes
    assert sum("multi_news" in note and "samsum" in note for note in notes) == 1, "one line for one reason"


def test_what_is_not_there_is_said(capsys):
    for argv, said in (
        (["ruller"], "did you mean 'ruler'"),
        (["ruler", "--scale", "tiny"], "unknown scale 'tiny'"),
        (["ruler", "--data", "rows"], "--data is for longbench"),
    ):
        assert main(["paper", *argv]) == 2
        assert said in capsys.readouterr().err


def test_listing_and_dry_run_name_everything_and_run_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["paper", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipes())
    for name in recipes():
        assert main(["paper", name, "--scale", "full", "--dry-run"]) == 0
        assert capsys.readouterr().out.count("skv ") == len(commands(name, "full"))
    assert not list(tmp_path.iterdir())
