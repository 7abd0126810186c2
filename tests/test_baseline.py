"""`skv baseline update`: only runs that can be trusted become baselines, in one step, and the changelog says so."""

from __future__ import annotations

import json

import pytest
from compare_folders import MODEL, answers, measurement, run_folder, sweep_folder
from filelock import FileLock
from test_cli import mistake

from cli.main import main
from evals.runs.results import read_run

GRID = {"lengths": [1024], "depths": list(range(20)), "rounds": 1, "samples": None}
GOOD = [1.0] * 20


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A project with a changelog, in which commands are run; writes finished runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- One.\n\n## 1.0\n\n- Zero.\n")

    def write(name, records, **changes):
        folder = run_folder(tmp_path / name, records, **{"selection": GRID, **changes})
        (folder / "summary.md").write_text("# done\n")
        return name

    return write


def test_a_finished_run_becomes_the_baseline_and_a_line(place, tmp_path, capsys):
    assert main(["baseline", "update", place("new", answers(GOOD)), "--name", "niah", "--reason", "first one."]) == 0
    kept = tmp_path / "results" / "baselines" / "niah"
    assert len(read_run(kept)[1]) == 20
    assert (kept / "summary.md").is_file()
    assert not (kept / ".lock").exists()
    changelog = (tmp_path / "CHANGELOG.md").read_text()
    line = "- Baseline `niah`: new; first one; niah on m, commit unknown.\n"
    assert changelog == f"# Changelog\n\n## Unreleased\n\n- One.\n{line}\n## 1.0\n\n- Zero.\n"
    assert "results/baselines/niah" in capsys.readouterr().out


def test_replacing_leaves_nothing_of_the_old_one_and_tells_what_changed(place, tmp_path):
    main(["baseline", "update", place("old", answers(GOOD)), "--name", "niah"])
    (tmp_path / "results" / "baselines" / "niah" / "stale.txt").write_text("")
    assert main(["baseline", "update", place("new", answers([0.0] * 10 + GOOD[10:])), "--name", "niah"]) == 0
    folder = tmp_path / "results" / "baselines"
    assert [entry.name for entry in folder.iterdir()] == ["niah"]
    assert not (folder / "niah" / "stale.txt").exists()
    changelog = " ".join((tmp_path / "CHANGELOG.md").read_text().split())
    assert "`niah`: replaced; niah on m, commit unknown; against the one before: 2 same, 1 worse." in changelog


def test_a_baseline_of_other_questions_is_replaced_and_said_so(place, tmp_path):
    main(["baseline", "update", place("old", answers(GOOD)), "--name", "niah"])
    other = place("new", answers(GOOD), config={"seed": 5, "protocol": "magic-number"})
    assert main(["baseline", "update", other, "--name", "niah"]) == 0
    assert "not comparable with the one before" in " ".join((tmp_path / "CHANGELOG.md").read_text().split())


@pytest.mark.parametrize(
    ("records", "changes", "says"),
    [
        (answers([None, *GOOD[1:]]), {}, "1 of its 20 records have no score"),
        (answers([float("nan"), *GOOD[1:]]), {}, "1 of its 20 records have no score"),
        (answers(GOOD), {"model": {**MODEL, "dummy": True}}, "made up"),
        (answers(GOOD)[:13], {}, "13 of 20 prompts are answered"),
        (answers(GOOD) + answers(GOOD, "tova")[:15], {}, "5 answers are missing that other methods gave"),
        (answers(GOOD), {"benchmark": "ruler", "selection": {"samples": 30}}, "fewer than 30 samples of magic-number"),
    ],
)
def test_runs_that_cannot_be_trusted_are_refused_unless_forced(place, tmp_path, capsys, records, changes, says):
    run = place("new", records, **changes)
    before = (tmp_path / "CHANGELOG.md").read_text()
    assert says in mistake(capsys, "baseline", "update", run)
    assert not (tmp_path / "results").exists()
    assert (tmp_path / "CHANGELOG.md").read_text() == before
    assert main(["baseline", "update", run, "--force", "-q"]) == 0
    assert "forced although" in " ".join((tmp_path / "CHANGELOG.md").read_text().split())


def test_stopped_runs_are_refused(place, tmp_path, capsys):
    run = place("new", answers(GOOD))
    with (tmp_path / run / "samples.jsonl").open("a") as file:
        file.write('{"benchmark": "ni')
    assert "its last line is unfinished" in mistake(capsys, "baseline", "update", run)
    (tmp_path / run / "summary.md").unlink()
    assert "it did not finish" in mistake(capsys, "baseline", "update", run)


def test_a_run_that_is_being_written_is_refused_even_when_forced(place, tmp_path, capsys):
    run = place("new", answers(GOOD))
    with FileLock(tmp_path / run / ".lock"):
        assert "another skv process" in mistake(capsys, "baseline", "update", run, "--force")


def test_sweeps_become_baselines_and_errors_in_them_do_not(place, tmp_path, capsys):
    good = sweep_folder(tmp_path / "sweep", [measurement("full", 0, 10.0)])
    (good / "summary.md").write_text("")
    assert main(["baseline", "update", "sweep", "-q"]) == 0
    failed = [measurement("full", 0, 10.0, status="error", error="x", step_ms=[])]
    bad = sweep_folder(tmp_path / "bad", failed)
    (bad / "summary.md").write_text("")
    assert "1 of its 1 records have no score" in mistake(capsys, "baseline", "update", "bad")


def test_mistakes_are_one_line(place, capsys, tmp_path):
    run = place("new", answers(GOOD))
    assert "no such folder" in mistake(capsys, "baseline", "update", "nowhere")
    assert "is not a name of a baseline" in mistake(capsys, "baseline", "update", run, "--name", "../up")
    main(["baseline", "update", run, "--name", "b", "-q"])
    itself = str(tmp_path / "results" / "baselines" / "b")
    assert "is the baseline itself" in mistake(capsys, "baseline", "update", itself)


def test_a_project_without_changelog_gets_one(place, tmp_path):
    run = place("new", answers(GOOD))
    assert main(["baseline", "update", run, "--changelog", "CHANGES.md", "--into", "kept", "-q"]) == 0
    assert (tmp_path / "CHANGES.md").read_text().startswith("# Changelog\n\n## Unreleased\n\n- Baseline `new`: new")
    assert json.loads((tmp_path / "kept" / "new" / "run.json").read_text())["benchmark"] == "niah"
