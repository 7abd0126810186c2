"""`skv leaderboard`: what was asked the same is ranked together, everything else apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_folders import METHODS, MODEL, NOTE, SESSION, answer, dummy, grid, manifest, measurements, write_run
from test_cli import mistake

from cli.main import main
from evals.reporting.folders import find_runs
from evals.reporting.leaderboard import rank


def board(*runs):
    return rank(find_runs(runs))


def ranking(group):
    """Place and label of every method, in order."""
    return [(row[0], ":".join(filter(None, row[1:3]))) for row in group.table.rows]


def test_methods_of_several_runs_are_ranked_together(tmp_path):
    one = write_run(tmp_path / "one", grid(METHODS[:2], [1024]), manifest(methods={}))
    better = [replace(r, method="loki:budget=64", score=0.75, device_bytes=2**18) for r in grid(["full"], [1024])]
    two = write_run(tmp_path / "two", [*grid(["full"], [1024]), *better], manifest(methods={}))
    (group,) = board(one, two).groups
    assert ranking(group) == [("1", "full"), ("2", "loki:budget=64"), ("3", "quest:budget=64")]
    full, loki, quest = group.table.rows
    assert full[3:5] == ["100.0", "100.0–100.0"]
    assert (loki[3], quest[3]) == ("75.0", "50.0")
    assert (loki[8], quest[8]) == ("25.0", "25.0")  # device bytes, of full attention's
    assert (full[10], loki[10], quest[10]) == ("one, two", "two", "one")
    assert list(group.problems) == []


def test_equal_scores_share_a_place(tmp_path):
    (group,) = board(write_run(tmp_path / "run", grid(lengths=[1024]))).groups
    assert [place for place, _ in ranking(group)] == ["1", "2", "2"]


@pytest.mark.parametrize(
    "other",
    [
        manifest(model={**MODEL, "name": "n"}),
        manifest(model={**MODEL, "weights_sha256": "other"}),
        manifest(model={**MODEL, "dtype": "bfloat16"}),
        dummy(),
        manifest(config={"seed": 1}),
        manifest(sources={"haystack": {"name": "essays", "sha256": "other"}}),
    ],
)
def test_runs_that_differ_in_what_changes_a_number_are_apart(tmp_path, other):
    runs = [write_run(tmp_path / "one", grid(lengths=[1024])), write_run(tmp_path / "two", grid(lengths=[1024]), other)]
    assert [len(group.table.rows) for group in board(*runs).groups] == [3, 3]


def test_the_device_and_the_time_do_not_part_runs(tmp_path):
    other = manifest(
        model={**MODEL, "device": "cuda"}, sessions=[replace(SESSION, started="2027-01-01T00:00:00+00:00")]
    )
    runs = [write_run(tmp_path / "one", grid(lengths=[1024])), write_run(tmp_path / "two", grid(lengths=[1024]), other)]
    assert len(board(*runs).groups) == 1


def test_lengths_and_prompts_are_never_averaged(tmp_path):
    one = write_run(tmp_path / "one", grid())
    fewer = write_run(tmp_path / "fewer", grid(lengths=[1024], samples=3))
    others = write_run(tmp_path / "others", [replace(r, prompt_sha256="x") for r in grid(lengths=[1024])])
    titles = [group.title for group in board(one, fewer, others).groups]
    assert len(titles) == 4
    assert sum("1k · 4 prompts" in title for title in titles) == 2
    assert sum("1k · 3 prompts" in title for title in titles) == 1
    assert sum("2k · 4 prompts" in title for title in titles) == 1


def test_a_run_without_run_json_is_like_no_other(tmp_path):
    runs = [write_run(tmp_path / name, grid(lengths=[1024])) for name in ("one", "two")]
    for run in runs:
        (run / "run.json").unlink()
    assert len(board(*runs).groups) == 2


def test_a_method_that_lacks_answers_is_named_and_unranked(tmp_path):
    records = grid(lengths=[1024])
    records[1] = replace(records[1], score=None, status="oom", error="out of memory")  # quest's first
    del records[2]  # shadowkv's
    (group,) = board(write_run(tmp_path / "run", records)).groups
    assert ranking(group) == [("1", "full"), ("–", "quest:budget=64"), ("–", "shadowkv:budget=64,rank=8")]
    for label in METHODS[1:]:
        assert f"{label} is unranked: 3 of 4 prompts have a scored answer" in group.problems


def test_an_answer_given_twice_counts_once_and_a_difference_is_named(tmp_path):
    one = write_run(tmp_path / "one", grid(lengths=[1024]))
    changed = [replace(r, score=0.0) if r.method == "full" else r for r in grid(lengths=[1024])]
    two = write_run(tmp_path / "two", changed)
    (group,) = board(one, two).groups
    assert group.table.rows[0][3] == "100.0"
    assert list(group.problems) == ["full: 4 scores of two differ from those of one, which count"]


def test_a_failed_answer_gives_way_to_another_runs(tmp_path):
    failed = [replace(r, score=None, status="oom") if r.method == "full" else r for r in grid(lengths=[1024])]
    runs = [write_run(tmp_path / "one", failed), write_run(tmp_path / "two", grid(lengths=[1024]))]
    (group,) = board(*runs).groups
    assert ranking(group)[0] == ("1", "full")


def test_files_say_what_is_left_out_and_what_is_a_dummy(tmp_path, capsys):
    run = write_run(tmp_path / "run", grid(), dummy())
    sweep = write_run(tmp_path / "sweep", measurements(), manifest("throughput"))
    out = tmp_path / "out"
    assert main(["leaderboard", str(run), str(sweep), "--out", str(out)]) == 1
    for name in ("leaderboard.md", "leaderboard.html"):
        text = (out / name).read_text()
        assert text.count(NOTE) >= 2  # of two lengths
        assert text.count("[dummy weights]") >= 2
        assert "a throughput run has no scores to rank" in text
    assert '<table class="sortable">' in (out / "leaderboard.html").read_text()
    said = capsys.readouterr()
    assert said.out.count("[dummy weights]") == 2
    assert "sweep is left out" in said.err


def test_names_of_methods_never_become_markup(tmp_path):
    nasty = "<script>alert(1)</script>"
    records = [*grid(["full"], [1024]), *(answer(nasty, n, prompt_sha256=f"1024-{n}") for n in range(4))]
    assert main(["leaderboard", str(write_run(tmp_path / "run", records)), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert nasty not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_only_sweeps_make_no_ranking(tmp_path, capsys):
    sweep = write_run(tmp_path / "sweep", measurements(), manifest("throughput"))
    assert "no scores to rank" in mistake(capsys, "leaderboard", str(sweep), "--out", str(tmp_path / "out"))
