"""Several processes share a run's prompts: the same answers, none lost, none twice."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from run_folders import answer

from cli.eval.answering import check_workers
from cli.main import main
from evals.runs.manifest import Circumstances, this_session
from evals.runs.results import read_run
from evals.runs.runner import Step
from evals.runs.task import Question
from evals.runs.workers import started
from shadowkv.common.errors import SkvError
from shadowkv.methods.full.method import Full

QUESTIONS = [Question("magic-number", 512, f"depth={depth},round=0") for depth in range(6)]
TASK = SimpleNamespace(benchmark="niah", prompt_of=lambda question: question)


def niah(model, out, words):
    asked = f"eval niah --haystack synthetic --max-new-tokens 4 {words}".split()
    assert main([*asked, "--model", str(model), "--out", str(out)]) == 0
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_workers_give_the_answers_of_one_process(tiny_folder, tmp_path, capsys):
    asked = "--lengths 300,400 --depths 3 -m full -m quest:budget=64"
    alone, together = tmp_path / "alone", tmp_path / "together"
    niah(tiny_folder, alone, f"{asked} -q")
    niah(tiny_folder, together, f"{asked} -q --samples 2")
    lines = niah(tiny_folder, together, f"{asked} --workers 2")
    assert "12/12" in capsys.readouterr().err
    assert len(lines) == 12, "what was answered before is not asked again"
    found = [{r.key: (r.tokens, r.score, r.prompt_sha256) for r in read_run(path)[1]} for path in (alone, together)]
    assert found[0] == found[1]
    assert "2 processes side by side" in (together / "summary.md").read_text()


def test_turns_of_a_text_stay_together(tiny_folder, tmp_path):
    lines = niah(tiny_folder, tmp_path / "run", "--lengths 1k --depths 2 -m full --turns 3 --workers 2 -q")
    assert len(lines) == len({line["sample"] for line in lines}) == 6


class Folder(dict):
    """In place of a run folder."""

    has = dict.__contains__

    def append(self, record):
        assert record.key not in self
        self[record.key] = record


def scripted(lines, place, count):
    """Begin of a process that sends what `lines` say of its place instead of answering."""
    if lines[place] == "refuses":
        raise SkvError("no such weights")
    if lines[place] == "dies at once":
        os._exit(3)
    session = this_session(["skv"], "cpu")
    return Script(lines[place]), Circumstances({"name": str(place)}, 256, session)


class Script:
    """A run whose task makes no prompts: it ends the process in their place."""

    def __init__(self, line):
        self.task = self.loaded = self
        self.benchmark, self.tokenizer, self._line = "niah", None, line

    def examples(self, tokenizer, todo):
        if self._line == "dies later":
            os._exit(4)
        return iter(())


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["is well", "refuses"], "no such weights"),
        (["dies at once", "is well"], r"ended early \(exit code 3\); run the same command to continue"),
        (["is well", "dies later"], r"ended early \(exit code 4\)"),
    ],
)
def test_a_process_that_fails_ends_the_run_in_a_line(lines, says):
    left = []

    def run():
        with started(2, partial(scripted, lines), [Full()]) as workers:
            left.extend(workers.processes)
            workers.run_accuracy(TASK, QUESTIONS, [Full()], Folder())

    with pytest.raises(SkvError, match=says):
        run()
    assert not any(process.is_alive() for process in left)


def test_progress_counts_what_was_answered_before():
    folder, steps = Folder(), list[Step]()
    folder.append(replace(answer(length=512), task=QUESTIONS[0].task, sample=QUESTIONS[0].sample))
    with started(1, partial(scripted, ["is well"]), [Full()]) as workers:
        assert workers.told.model == {"name": "0"}
        workers.run_accuracy(TASK, QUESTIONS, [Full()], folder, steps.append)
    assert steps == [Step(1, 6, None)]


@pytest.mark.parametrize(
    ("count", "device", "says"),
    [(0, "cpu", "at least 1"), (2, "cuda:1", "leave out --device cuda:1"), (99, "cuda", "needs as many GPUs")],
)
def test_impossible_numbers_of_workers_are_refused(count, device, says):
    with pytest.raises(SkvError, match=says):
        check_workers(count, device)
    check_workers(1, "cuda:1")
