"""`skv compare` on run folders whose truth is known: the verdict, the exit code, and one line for what cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict

import pytest
from compare_folders import MODEL, answer, answers, measurement, run_folder, sweep_folder
from test_cli import mistake
from test_results import manifest

from cli.main import main
from evals.compare.gate import parse_gate
from evals.compare.run import compare
from shadowkv.common.errors import SkvError

RIGHT, WRONG = 1.0, 0.0
GOOD = [RIGHT] * 160 + [WRONG] * 40
DROPPED = [WRONG] * 10 + GOOD[10:]  # 5 points of 200 samples
ALL = parse_gate([])


@pytest.fixture
def folder(tmp_path):
    """Write a run into a folder of its own name."""

    def write(name, records, **changes):
        return run_folder(tmp_path / name, records, **changes)

    return write


def verdicts(found):
    return {(row.metric, row.method, row.place): str(row.verdict) for row in found.rows}


def said(capsys, *argv):
    code = main([str(word) for word in argv])
    return code, capsys.readouterr().out


def test_identical_runs_are_the_same_in_everything(capsys, folder):
    both = [folder(name, answers(GOOD) + answers(GOOD, "quest:budget=64")) for name in ("a", "b")]
    assert set(verdicts(compare(*both, ALL)).values()) == {"same"}
    code, out = said(capsys, "compare", *both)
    assert code == 0
    assert "passed: 6 same" in out


def test_a_drop_of_five_points_on_200_samples_fails(capsys, folder):
    before, after = folder("a", answers(GOOD)), folder("b", answers(DROPPED))
    (row,) = compare(before, after, ALL).scores
    assert (row.samples, row.wins, row.losses, row.changed) == (200, 0, 10, 10)
    assert row.difference == pytest.approx(-0.05)
    assert row.low < -0.05 < row.high < 0
    assert row.p == pytest.approx(2 / 2**10)
    assert row.verdict == "worse"
    assert said(capsys, "compare", before, after)[0] == 1
    assert said(capsys, "compare", before, after, "--fail-on", "accuracy=0.02")[0] == 1
    # Found all the same, but smaller than what is to fail, or not what is to fail.
    assert said(capsys, "compare", before, after, "--fail-on", "accuracy=0.06")[0] == 0
    assert said(capsys, "compare", before, after, "--fail-on", "memory")[0] == 0
    assert said(capsys, "compare", before, after, "--fail-on", "nothing")[0] == 0
    assert said(capsys, "compare", after, before)[0] == 0


def test_ten_answers_that_changed_both_ways_do_not_fail(folder):
    turned = [WRONG] * 5 + GOOD[5:-5] + [RIGHT] * 5
    (row,) = compare(folder("a", answers(GOOD)), folder("b", answers(turned)), ALL).scores
    assert (row.wins, row.losses, row.changed) == (5, 5, 10)
    assert row.verdict == "undecided"
    assert row.more_needed > 0


def test_the_same_drop_in_one_of_many_cells_must_stand_out_from_all_of_them(folder):
    """p = 0.002 in one of 30 cells is what chance does in one comparison of 17."""
    many = [record for n in range(30) for record in answers(GOOD, task=f"t{n}")]
    drop = [record for n in range(30) for record in answers(DROPPED if n == 0 else GOOD, task=f"t{n}")]
    found = compare(folder("a", many), folder("b", drop), ALL)
    first = next(row for row in found.scores if row.place.startswith("t0 "))
    assert first.p_holm > 0.05
    assert first.verdict == "undecided"


def test_a_method_that_drops_a_little_everywhere_is_found_by_its_mean(folder):
    before = [r for n in range(10) for r in answers(GOOD[::5], task=f"t{n}")]
    after = [r for n in range(10) for r in answers([WRONG] * 3 + GOOD[::5][3:], task=f"t{n}")]
    found = compare(folder("a", before), folder("b", after), ALL)
    assert [row.place for row in found.failures] == ["mean of 10 cells"]


def test_graded_scores_get_a_permutation_test(folder):
    after = [score - 0.25 * (n < 12) - 0.5 * (n in (1, 2)) for n, score in enumerate(GOOD)]
    (row,) = compare(folder("a", answers(GOOD)), folder("b", answers(after)), ALL).scores
    assert row.p == pytest.approx(2 / 2**12)  # all 12 changes are losses, and all swaps are counted
    assert row.verdict == "worse"


def test_other_words_with_the_same_score_are_shown_and_not_judged_as_a_loss(folder):
    after = [answer(n, score, prediction="in other words") for n, score in enumerate(GOOD)]
    (row,) = compare(folder("a", answers(GOOD)), folder("b", after), ALL).scores
    assert row.changed == 200
    assert row.verdict == "same"


def test_an_answer_that_failed_is_lost_and_not_a_zero(capsys, folder):
    after = answers([None, *GOOD[1:]])
    found = compare(folder("a", answers(GOOD)), folder("b", after), ALL)
    (row,) = found.scores
    assert (row.lost, row.samples, row.losses) == (1, 199, 0)
    assert row.before == row.after == pytest.approx(159 / 199)
    assert row.verdict == "worse"
    assert "1 answers lost" in row.why
    assert found.failures


def test_an_answer_that_had_failed_before_is_found_and_in_no_mean(folder):
    found = compare(folder("a", answers([None, *GOOD[1:]])), folder("b", answers(GOOD)), ALL)
    (row,) = found.scores
    assert (row.found, row.lost, row.samples) == (1, 0, 199)
    assert not found.failures


def test_scores_that_are_not_numbers_count_as_unscored(folder):
    found = compare(folder("a", answers(GOOD)), folder("b", answers([float("nan"), *GOOD[1:]])), ALL)
    assert "CURRENT: 1 scores are not numbers and count as unscored" in found.notes
    assert found.scores[0].lost == 1
    assert found.scores[0].after is not None


def test_a_run_that_stopped_halfway_fails_and_says_what_is_missing(folder):
    found = compare(folder("a", answers(GOOD)), folder("b", answers(GOOD)[:137]), ALL)
    assert "CURRENT does not hold 63 of the 200 answers that it was asked for" in found.notes
    assert found.scores[0].lost == 63
    assert found.failures


def test_a_run_that_was_asked_for_less_is_compared_in_what_it_has(folder):
    after = folder("b", answers(GOOD)[:100], selection={"lengths": [1024], "samples": 100})
    found = compare(folder("a", answers(GOOD)), after, ALL)
    assert found.scores[0].samples == 100
    assert "100 answers are only in BASELINE and left out" in found.notes
    assert not found.failures


def test_methods_of_one_side_are_named(folder):
    found = compare(folder("a", answers(GOOD) + answers(GOOD, "tova")), folder("b", answers(GOOD)), ALL)
    assert "only in BASELINE: tova" in found.notes
    assert {row.method for row in found.rows} == {"full"}


def test_memory_that_grows_fails(folder):
    larger = [answer(n, score, device_bytes=11) for n, score in enumerate(GOOD)]
    found = compare(folder("a", answers(GOOD)), folder("b", larger), ALL)
    assert [(row.metric, row.what, row.ratio) for row in found.failures] == [("memory", "KV on device", 1.1)]
    assert not compare(folder("c", answers(GOOD)), folder("d", larger), parse_gate(["memory=20%"])).failures


def test_a_repeated_comparison_says_the_same(folder):
    after = [score - 0.3 * (n % 7 == 0) - 0.2 * (n % 5 == 0) for n, score in enumerate([RIGHT] * 200)]
    both = folder("a", answers([RIGHT] * 200)), folder("b", answers(after))
    assert compare(*both, ALL) == compare(*both, ALL)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": {"seed": 1, "protocol": "magic-number"}}, "config.seed: 0 -> 1"),
        ({"model": {**MODEL, "weights_sha256": "xyz"}}, "model.weights_sha256: abc -> xyz"),
        ({"sources": {"haystack": {"sha256": "e"}}}, "sources.haystack.sha256: None -> e"),
        ({"selection": {"lengths": [1024, 2048]}}, "lengths: [1024] -> [1024, 2048]"),
        ({"methods": {"full": {"page": 2}}}, "methods.full.page: 1 -> 2"),
        ({"benchmark": "ruler"}, "benchmark: niah -> ruler"),
    ],
)
def test_runs_of_other_questions_are_refused_by_field(capsys, folder, changes, says):
    before = folder("a", answers(GOOD), methods={"full": {"page": 1}})
    after = folder("b", answers(GOOD), **{"methods": {"full": {"page": 1}}, **changes})
    assert says in mistake(capsys, "compare", str(before), str(after))


def test_other_prompts_are_refused(capsys, folder):
    after = [answer(n, score, prompt_sha256="other") for n, score in enumerate(GOOD)]
    line = mistake(capsys, "compare", str(folder("a", answers(GOOD))), str(folder("b", after)))
    assert "prompts: 200 samples have another prompt_sha256" in line


def test_a_new_parameter_of_a_method_is_no_other_setting(folder):
    after = folder("b", answers(GOOD), methods={"full": {"page": 1, "later": 3}})
    assert not compare(folder("a", answers(GOOD), methods={"full": {"page": 1}}), after, ALL).failures


def test_no_sample_or_method_in_common_is_refused(capsys, folder):
    before = folder("a", answers(GOOD))
    later = [answer(n + 500, RIGHT) for n in range(9)]
    assert "no sample in common" in mistake(capsys, "compare", str(before), str(folder("b", later)))
    assert "no method in common" in mistake(capsys, "compare", str(before), str(folder("c", answers(GOOD, "tova"))))


def test_folders_that_are_none_say_what_is_there(capsys, folder, tmp_path):
    good = str(folder("a", answers(GOOD)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "samples.jsonl").write_text("{}\n")
    begun = folder("begun", answers(GOOD))
    (begun / "samples.jsonl").unlink()
    for name, says in (
        ("nowhere", "no such folder"),
        ("empty", "holds no run.json, it is empty"),
        ("half", "holds no run.json, only samples.jsonl"),
        ("begun", "holds no record in samples.jsonl, only run.json"),
        ("a/run.json", "is a file, not a run folder"),
    ):
        line = mistake(capsys, "compare", good, str(tmp_path / name))
        assert line.startswith(f"skv: CURRENT {tmp_path / name}")
        assert says in line


def test_another_schema_is_refused_by_name(capsys, folder):
    good = folder("a", answers(GOOD))
    newer = folder("b", answers(GOOD), schema=2)
    assert "schema 2; this version of skv reads schema 1" in mistake(capsys, "compare", str(good), str(newer))
    described = json.loads((newer / "run.json").read_text())
    (newer / "run.json").write_text(json.dumps({**described, "field_of_tomorrow": 1}))
    assert "schema 2" in mistake(capsys, "compare", str(good), str(newer))
    (newer / "run.json").write_text("[]")
    assert "is not a run.json" in mistake(capsys, "compare", str(good), str(newer))


def test_a_score_beyond_its_scale_is_refused(capsys, folder):
    wild = folder("b", answers([100.0, *GOOD[1:]]))
    assert "scores are 0 to 1 or null" in mistake(capsys, "compare", str(folder("a", answers(GOOD))), str(wild))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (["acuracy=0.1"], "did you mean 'accuracy'"),
        (["accuracy=2"], "write a tolerance above 0 and below 1"),
        (["accuracy=0"], "write a tolerance"),
        (["accuracy=nan"], "write a tolerance"),
        (["accuracy="], "write a tolerance"),
        (["accuracy=1%", "accuracy=2%"], "given twice"),
        (["nothing", "memory"], "contradicts"),
    ],
)
def test_gates_that_make_no_sense_are_refused(capsys, spec, says):
    words = [word for one in spec for word in ("--fail-on", one)]
    assert says in mistake(capsys, "compare", "a", "b", *words)


def test_gates_are_read():
    gate = parse_gate(["accuracy=0.03", "throughput=7%"])
    assert gate.tolerances == {"accuracy": 0.03, "fidelity": 0.05, "throughput": pytest.approx(0.07), "memory": 0.01}
    assert gate.failing == {"accuracy", "throughput"}
    assert parse_gate(["nothing"]).failing == set()
    with pytest.raises(SkvError):
        parse_gate(["nothing", "nothing"])


def test_a_gate_that_could_never_fail_is_refused(capsys, folder, tmp_path):
    both = [str(folder(name, answers(GOOD))) for name in "ab"]
    line = mistake(capsys, "compare", *both, "--fail-on", "throughput=5%")
    assert "--fail-on throughput: these runs measure accuracy, memory" in line
    assert main(["compare", *both, "--fail-on", "throughput=5%", "--fail-on", "accuracy"]) == 0
    assert "Not measured by these runs: throughput" in capsys.readouterr().out


def test_files_and_json_say_the_same(capsys, folder, tmp_path):
    before, after = folder("a", answers(GOOD)), folder("b", answers(DROPPED))
    page, xml = tmp_path / "page.md", tmp_path / "junit.xml"
    code, out = said(capsys, "compare", before, after, "--markdown", page, "--junit", xml, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["failed"]
    assert [row["verdict"] for row in found["scores"]] == ["worse"]
    assert "worse, FAILS" in page.read_text()
    assert "FAILED: 2 same, 1 worse; 1 of them fail" in page.read_text()
    suite = ET.parse(xml).getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    (failed,) = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    assert failed.get("classname") == "accuracy.full"


def test_text_from_runs_cannot_break_out_of_any_output(capsys, folder, tmp_path):
    evil = "x</testcase>\x1b[31m|\u202e\x00[bold]"
    runs = [answers(s, task=evil, prediction="\x1b[2J" * 9) for s in (GOOD, DROPPED)]
    both = [folder(n, run, notes=[f"{evil}\nsecond"]) for n, run in zip("ab", runs, strict=True)]
    page, xml = tmp_path / "page.md", tmp_path / "junit.xml"
    code, out = said(capsys, "compare", *both, "--markdown", page, "--junit", xml)
    assert code == 1
    assert "<" not in page.read_text()
    for text in (out, page.read_text(), xml.read_text()):
        assert not set("\x1b\x00\u202e") & set(text)
    assert ET.parse(xml).getroot().find("testsuite").get("failures") == "1"


def test_huge_predictions_are_compared_and_not_shown(capsys, folder):
    huge = [answer(n, RIGHT, prediction="lorem " * 10**6) for n in range(3)]
    code, out = said(capsys, "compare", folder("a", huge), folder("b", huge))
    assert code == 0
    assert len(out) < 10_000


def test_a_file_that_cannot_be_written_is_said_before_anything(capsys):
    assert "nowhere is not a folder" in mistake(capsys, "compare", "a", "b", "--markdown", "nowhere/x.md")


def test_comparing_answers_needs_no_torch(folder):
    both = [str(folder(name, answers(GOOD))) for name in "ab"]
    code = f"import sys; from cli.main import main; main(['compare', '-q', *{both}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SPEEDS = [100.0, 101.0, 99.0, 100.5, 99.5]


def sweep(speeds, method="full", **changes):
    return [measurement(method, n, speed, **changes) for n, speed in enumerate(speeds)]


@pytest.mark.parametrize(
    ("speeds", "verdict"),
    [
        ([90.0, 91.0, 89.0, 90.5, 89.5], "worse"),
        ([110.0, 111.0, 109.0, 110.5, 109.5], "better"),
        ([100.2, 100.8, 99.4, 100.1, 99.5], "same"),
        ([98.0, 97.5, 98.5, 98.2, 97.8], "same"),  # slower, but by less than matters
        ([60.0, 140.0, 95.0, 85.0, 110.0], "undecided"),
    ],
)
def test_speeds_are_judged_beside_the_spread_of_repeats(tmp_path, speeds, verdict):
    both = sweep_folder(tmp_path / "a", sweep(SPEEDS)), sweep_folder(tmp_path / "b", sweep(speeds))
    found = compare(*both, ALL)
    speed = next(row for row in found.ratios if row.metric == "throughput")
    assert speed.verdict == verdict
    assert bool(found.failures) == (verdict == "worse")
    assert (speed.more_needed is not None) == (verdict == "undecided")


def test_identical_sweeps_are_the_same_however_wide_their_spread(tmp_path):
    wide = sweep([60.0, 140.0, 95.0, 85.0, 110.0])
    found = compare(sweep_folder(tmp_path / "a", wide), sweep_folder(tmp_path / "b", wide), ALL)
    assert set(verdicts(found).values()) == {"same"}


def test_a_method_that_now_runs_out_of_memory_fails(tmp_path):
    gone = [measurement("full", 0, 1.0, status="oom", error="full", step_ms=[])]
    found = compare(sweep_folder(tmp_path / "a", sweep(SPEEDS)), sweep_folder(tmp_path / "b", gone), ALL)
    assert {(row.metric, row.why) for row in found.failures} == {
        ("throughput", "ran before, now oom"),
        ("memory", "ran before, now oom"),
    }


def test_sweeps_of_another_machine_are_refused(capsys, tmp_path):
    other = sweep(SPEEDS, machine="other box")
    config = {"seed": 0, "machine": "other box", "synthetic_kv": False}
    both = [sweep_folder(tmp_path / "a", sweep(SPEEDS)), sweep_folder(tmp_path / "b", other, config=config)]
    assert "config.machine: box -> other box" in mistake(capsys, "compare", *map(str, both))
    forced = sweep_folder(tmp_path / "c", other)  # continued on another machine by --force
    assert "machines: box; other box" in mistake(capsys, "compare", str(both[0]), str(forced))


def test_a_sweep_and_answers_are_refused(capsys, folder, tmp_path):
    both = folder("a", answers(GOOD)), sweep_folder(tmp_path / "b", sweep(SPEEDS))
    assert "benchmark: niah -> throughput" in mistake(capsys, "compare", *map(str, both))


def test_the_manifest_of_these_folders_is_what_runs_write(folder):
    """The synthetic folders hold what `Manifest` holds: if that changes, they do."""
    written = json.loads((folder("a", answers(GOOD)) / "run.json").read_text())
    assert written.keys() == asdict(manifest()).keys()
