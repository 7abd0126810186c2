"""The CI kit: valid files, one set of commands everywhere, and a gate that fails when it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from compare_folders import answers, run_folder

ROOT = Path(__file__).parent.parent
WORKFLOW, ACTION = ROOT / ".github" / "workflows" / "regression.yml", ROOT / "action.yml"
_PARTS = ("niah", "ruler", "fidelity")
BASELINES = [ROOT / "results" / "baselines" / f"regression-{name}-smollm2-135m" for name in _PARTS]


@pytest.mark.parametrize(("file", "schema"), [(WORKFLOW, "vendor.github-workflows"), (ACTION, "vendor.github-actions")])
def test_files_follow_the_schema_of_github(file, schema):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert yaml.safe_load(file.read_text())


def steps():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    return [*(step for job in jobs for step in job["steps"]), *yaml.safe_load(ACTION.read_text())["runs"]["steps"]]


def test_actions_are_pinned_by_version():
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", action) for action in used)


def test_no_script_is_made_of_somebody_elses_text():
    """Inputs and events reach scripts as variables: pasted into one, they would be code."""
    assert not [step["run"] for step in steps() if "${{" in step.get("run", "")]


def test_the_workflow_runs_what_ci_runs_and_that_ends_with_the_regression_set():
    commands = [
        step["run"] for step in yaml.safe_load(WORKFLOW.read_text())["jobs"]["regression"]["steps"] if "run" in step
    ]
    assert commands == [".ci/run"]
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith('make regression VENV="$VENV"')
    shown = subprocess.run(["make", "-n", "regression"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".ci/regression" in shown
    assert set(re.findall(r"regression-\w+-smollm2-135m", (ROOT / ".ci" / "regression").read_text())) == {
        folder.name for folder in BASELINES
    }


def test_the_workflow_tests_both_ends_of_what_is_supported():
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["transformers"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ['make "test-$END"']
    for end in job["strategy"]["matrix"]["end"]:
        shown = subprocess.run(["make", "-n", f"test-{end}"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert 'pip install --quiet --upgrade "transformers' in shown.stdout
        assert "tests/test_engine.py" in shown.stdout


@pytest.mark.parametrize("script", ["run", "gate", "lock", "regression"])
def test_scripts_can_be_run_and_read(script):
    path = ROOT / ".ci" / script
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


@pytest.mark.parametrize("folder", BASELINES, ids=lambda path: path.name)
def test_baselines_are_runs_of_the_commands_of_the_script(folder):
    """What was run for a baseline is what is run now; otherwise the gate would compare other questions."""
    from evals.compare.baselines import unfit
    from evals.runs.manifest import Manifest

    described = Manifest.read(folder / "run.json")
    assert unfit(folder, described) == []
    script = (ROOT / ".ci" / "regression").read_text()
    words = described.sessions[-1].command.split()
    options = words[words.index("eval") + 2 : words.index("--quiet")]
    assert all(option in script for option in options)
    assert described.sessions[-1].machine["torch_threads"] == 1


@pytest.fixture
def gate(tmp_path):
    """Run .ci/gate with an skv whose `eval` copies a run that was made before."""
    fake = tmp_path / "skv"
    fake.write_text(
        f"#!/bin/bash\nif [ $1 = eval ]; then cp -r {tmp_path}/made ${{@: -1}}; exit ${{EVAL_CODE:-0}}; fi\n"
        f'exec {sys.executable} -m cli.main "$@"\n'
    )
    fake.chmod(0o755)

    def run(before, after, **settings):
        run_folder(tmp_path / "baseline", before)
        run_folder(tmp_path / "made", after)
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SKV": str(fake),
            "GITHUB_STEP_SUMMARY": str(tmp_path / "page.md"),
        }
        command = [
            str(ROOT / ".ci" / "gate"),
            str(tmp_path / "baseline"),
            str(tmp_path / "out" / "run"),
            "eval",
            "niah",
        ]
        return subprocess.run(command, env={**env, **settings}, capture_output=True, text=True, check=False)

    return run


def test_the_gate_passes_alike_runs_and_writes_the_summary(gate, tmp_path):
    (tmp_path / "out" / "run").mkdir(parents=True)  # of an earlier run: must not be continued
    (tmp_path / "out" / "run" / "old").write_text("")
    done = gate(answers([1.0] * 50), answers([1.0] * 50), FAIL_ON="accuracy=0.02 memory=1%")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "run" / "old").exists()
    assert "passed: 3 same" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "out" / "run.xml").is_file()
    assert (tmp_path / "out" / "run.report" / "report.html").is_file()


def test_the_gate_fails_on_a_planted_regression(gate, tmp_path):
    done = gate(answers([1.0] * 50), answers([0.0] * 10 + [1.0] * 40), FAIL_ON="accuracy=0.02 memory=1%")
    assert done.returncode == 1, done.stderr
    assert "FAILED" in (tmp_path / "page.md").read_text()


def test_the_gate_tells_lost_answers(gate, tmp_path):
    lost = gate(answers([1.0] * 50), answers([None] * 5 + [1.0] * 45), EVAL_CODE="1")
    assert lost.returncode == 1
    assert "5 answers lost" in (tmp_path / "page.md").read_text()


def test_the_gate_stops_at_a_command_that_cannot_run(gate, tmp_path):
    assert gate(answers([1.0]), answers([1.0]), EVAL_CODE="2").returncode == 2
    assert not (tmp_path / "page.md").exists()
