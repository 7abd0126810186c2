"""Drawn answers: the same whatever else is run and however, records of their own, and numbers over prompts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations
from statistics import mean

import pytest
import torch
from run_folders import answer, grid, manifest, write_run

from cli.main import main
from evals.common.asking.drawing import prompt_name
from evals.compare.baselines import unfit
from evals.compare.gate import parse_gate
from evals.compare.run import compare
from evals.niah.turns import MultiTurnNiah
from evals.reporting.folders import find_runs
from evals.reporting.leaderboard import rank
from evals.runs.results import read_run
from evals.runs.wrapping.sampled import SampledTask, Sampling
from evals.tables.attempts import pass_at, pass_rates
from evals.tables.summary import scores_of, summarise
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.models.loading import load_model
from shadowkv.models.resolving import resolve

METHODS = ("-m", "full", "-m", "quest:budget=64", "-m", "shadowkv:rank=32,budget=2048")
DRAWN = ("--temperature", "1.5", "--top-p", "0.95", "--answers", "3")


def run(model, out, *more, methods=METHODS, drawn=DRAWN):
    """Answers of a run by their keys, without what may differ: times, and what was there to reuse."""
    words = [
        "eval",
        "niah",
        "--haystack",
        "synthetic",
        "--max-new-tokens",
        "6",
        "--lengths",
        "300,400",
        "--depths",
        "2",
    ]
    assert main([*words, "--model", str(model), "--out", str(out), "-q", *methods, *drawn, *more]) == 0
    return {r.key: timeless(r) for r in read_run(out)[1]}


def timeless(record):
    return replace(record, prefill_s=0, build_s=0, decode_s=0, reused_tokens=0)


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    return run(tiny_folder, tmp_path_factory.mktemp("whole") / "run")


# ---- the same answers, whatever else is run and however


def test_every_answer_is_a_record_of_one_prefill(tiny_folder, tmp_path, monkeypatch, whole):
    real, prefills = Engine.prefill, []
    monkeypatch.setattr(Engine, "prefill", lambda self, ids, *rest: prefills.append(ids) or real(self, ids, *rest))
    assert run(tiny_folder, tmp_path / "run", "--no-self-check") == whole
    assert len(prefills) == 4, "one for each prompt"
    assert len(whole) == 4 * 3 * 3
    assert {key.sample for key in whole} == {f"depth={d},round=0,answer={n}" for d in (0, 100) for n in (1, 2, 3)}
    by_prompt = {}
    for record in whole.values():
        assert record.meta["answer"] == int(record.sample[-1])
        by_prompt.setdefault((record.method, record.prompt), set()).add(tuple(record.tokens))
    assert mean(map(len, by_prompt.values())) > 2, "answers differ"


@pytest.mark.parametrize(
    "more",
    [["--workers", "2"], ["--stream"], ["--no-prefix-reuse"], ["--diagnostics"]],
    ids=["workers", "stream", "no-reuse", "diagnostics"],
)
def test_answers_do_not_hang_on_how_they_are_made(tiny_folder, tmp_path, whole, more):
    found = run(tiny_folder, tmp_path / "run", *more)
    assert {k: (r.tokens, r.score) for k, r in found.items()} == {k: (r.tokens, r.score) for k, r in whole.items()}
    judged = [r for r in found.values() if "diagnostics" in r.meta]
    assert {r.meta["answer"] for r in judged} == ({1} if more == ["--diagnostics"] else set())


def test_answers_do_not_hang_on_what_else_is_asked(tiny_folder, tmp_path, whole):
    found = run(tiny_folder, tmp_path / "turned", methods=(*METHODS[4:], *METHODS[:2]))
    assert found == {key: r for key, r in whole.items() if not key.method.startswith("quest")}
    found = run(tiny_folder, tmp_path / "few", "--samples", "1", methods=METHODS[2:4])
    assert len(found) == 3
    assert found.items() <= whole.items()
    found = run(tiny_folder, tmp_path / "one", drawn=(*DRAWN[:-1], "1"))
    assert found == {key: r for key, r in whole.items() if key.sample.endswith("answer=1")}
    other = run(tiny_folder, tmp_path / "other", "--sampling-seed", "1", methods=METHODS[:2])
    assert {key: r.prompt_sha256 for key, r in other.items()}.items() <= {
        key: r.prompt_sha256 for key, r in whole.items()
    }.items(), "the same prompts"
    assert [r.tokens for r in other.values()] != [whole[key].tokens for key in other]


def test_methods_share_their_random_numbers(whole):
    """So one that loses nothing, as this setting of ShadowKV, gives the very answers of full attention."""
    labels = {key.method for key in whole}
    lossless = next(label for label in labels if label.startswith("shadowkv"))
    for key, record in whole.items():
        if key.method == lossless:
            assert record.tokens == whole[key._replace(method="full")].tokens


@pytest.mark.parametrize("more", [[], ["--turns", "2", "--lengths", "1k"]], ids=["one turn", "turns"])
def test_a_run_goes_on_answer_by_answer(tiny_folder, tmp_path, more):
    methods = METHODS[:4]
    undisturbed = run(tiny_folder, tmp_path / "run", *more, methods=methods)
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines(keepends=True)
    kept = [line for n, line in enumerate(lines) if n % 5 not in (1, 3)]
    (tmp_path / "run" / "samples.jsonl").write_text("".join(kept) + lines[1][:-40])
    for more_workers in ([], ["--workers", "2"]):
        assert run(tiny_folder, tmp_path / "run", *more, *more_workers, methods=methods) == undisturbed
        after = (tmp_path / "run" / "samples.jsonl").read_text().splitlines(keepends=True)
        assert after[: len(kept)] == kept
        assert len(after) == len(lines) == len(undisturbed), "nothing lost, nothing doubled"
        (tmp_path / "run" / "samples.jsonl").write_text("".join(kept))


def test_turns_go_on_from_their_own_answer(tiny_folder):
    """Each answer's conversation, made by hand."""
    loaded = load_model(resolve(str(tiny_folder)), device="cpu", dtype="float32")
    inner = MultiTurnNiah(lengths=(1024,), depths=(50.0,), haystack_spec="synthetic", turns=2, max_new_tokens=5)
    task = SampledTask(inner, Sampling(2.0, answers=2))
    questions = task.questions(loaded.tokenizer)
    assert [q.sample[-15:] for q in questions] == [f"turn={t},answer={n}" for t in (1, 2) for n in (1, 2)]
    assert len({task.prompt_of(question) for question in questions}) == 1
    (example,) = task.examples(loaded.tokenizer, questions)

    from evals.runs.runner import Run, run_accuracy

    engine, method, held = Engine(loaded.model), parse_method("full"), {}
    folder = type("Folder", (dict,), {"has": dict.__contains__, "append": lambda self, r: held.update({r.sample: r})})()
    run_accuracy(Run(engine, loaded, task), questions, [method], folder)
    assert len(held) == 4
    for attempt in example.attempts:
        prefill = engine.prefill(torch.tensor([example.input_ids]))
        cache, unfed = engine.replay(prefill, method), []
        for turn in attempt.later:
            logits = engine.extend(cache, torch.tensor([[*unfed, *turn.input_ids]]))
            tokens = engine.decode(cache, logits, 5, loaded.stop_ids, choose=turn.chooser())[0]
            assert held[turn.sample].tokens == tokens
            unfed = tokens[-1:] if len(tokens) == 5 else []
    first, second = ([held[f"depth=50,round=0,turn={t},answer={n}"].tokens for t in (1, 2)] for n in (1, 2))
    assert first != second


# ---- greedy runs stay what they were


def test_greedy_runs_know_nothing_of_it(tiny_folder, tmp_path):
    run(tiny_folder, tmp_path / "run", methods=METHODS[:2], drawn=())
    described, records = read_run(tmp_path / "run")
    assert not {"sampling", "thinking_tokens"} & described.config.keys()
    assert not any("drawn" in note for note in described.notes)
    line = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert set(line["meta"]) == {"depth", "round", "needle_token", "max_new_tokens"}
    assert not any("answer=" in record.sample for record in records)
    assert not (tmp_path / "run" / "passes.csv").exists()
    drawn = run(tiny_folder, tmp_path / "run2", methods=METHODS[:2], drawn=("--temperature", "1e-9"))
    assert [r.tokens for r in drawn.values()] == [r.tokens for r in records], "without any temperature left"
    assert read_run(tmp_path / "run2")[0].folder_name != described.folder_name


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--temperature -1", "--temperature must be a number above 0, or 0 for greedy answers, got -1"),
        ("--temperature nan", "got nan"),
        ("--temperature inf", "got inf"),
        ("--temperature 1 --top-p 0", "--top-p must be above 0 and at most 1"),
        ("--temperature 1 --top-p 1.01", "got 1.01"),
        ("--top-p nan", "got nan"),
        ("--temperature 1 --answers 0", "--answers must be at least 1, got 0"),
        ("--answers 4", "does nothing to greedy answers, which are all alike; add --temperature"),
        ("--temperature 0 --top-p 0.9", "--top-p 0.9 does nothing to greedy answers"),
        ("--sampling-seed 1", "--sampling-seed 1 does nothing"),
    ],
)
@pytest.mark.parametrize("command", ["niah", "ruler", "longbench"])
def test_bad_settings_are_a_line(words, says, command, capsys):
    assert main(["eval", command, *words.split()]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert says in said[0]


@pytest.mark.parametrize("command", ["niah", "ruler", "longbench"])
def test_help_shows_an_example(command, capsys):
    main(["eval", command, "--help"])
    said = " ".join(re.sub(r"[│\s]+", " ", capsys.readouterr().out).split())
    assert "--answers 4" in said or "--answers 8" in said
    assert "every method gets the same" in said


# ---- numbers over prompts


def drawn(method="full", prompt=0, scores=(1.0,)):
    """Answers to one prompt."""
    made = [(n, answer(method, prompt, score)) for n, score in enumerate(scores, 1)]
    return [replace(r, sample=f"{r.sample},answer={n}", meta={**r.meta, "answer": n}) for n, r in made]


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for answers in range(1, 7):
        for right in range(answers + 1):
            held = [1] * right + [0] * (answers - right)
            for k in range(1, answers + 1):
                expected = mean(any(chosen) for chosen in combinations(held, k))
                assert pass_at(k, right, answers) == pytest.approx(expected)
    with pytest.raises(ValueError, match="needs at least 3 answers, not 2"):
        pass_at(3, 1, 2)


def test_answers_are_averaged_by_prompt_first():
    records = [*drawn(scores=(1, 1, 1, None)), *drawn(prompt=1, scores=(0, 0, 1, 0)), *drawn(prompt=2, scores=(0,) * 4)]
    assert scores_of(records) == [1.0, 0.25, 0.0]
    (row,) = summarise(records)
    assert row.score == pytest.approx(1.25 / 3)
    assert (row.scored, row.total) == (11, 12)
    prompts = summarise([answer(sample=n, score=s) for n, s in enumerate((1.0, 0.25, 0.0))])[0]
    assert (row.score_low, row.score_high) == (prompts.score_low, prompts.score_high), "intervals are over prompts"
    rates = {rate.k: rate for rate in pass_rates(records, lambda _: True)}
    assert rates[1].rate == pytest.approx(1.25 / 3)
    assert rates[4].rate == pytest.approx(1 / 2), "of the two prompts that have four scored answers"
    assert (rates[4].prompts, rates[4].left_out) == (2, 1)
    assert pass_rates(records, lambda _: False) == []
    assert pass_rates([answer()], lambda _: True) == [], "greedy"
    assert prompt_name("depth=5,round=0,turn=2,answer=12") == "depth=5,round=0,turn=2"


def sampling(**changes):
    asked = {"temperature": 0.7, "top_p": 0.9, "answers": 4, "sampling_seed": 0}
    return manifest(config={"seed": 0, "sampling": {**asked, **changes}}, methods={"full": {}}, notes=["4 drawn"])


def test_runs_are_compared_by_prompt_and_only_if_they_were_drawn_alike(tmp_path):
    before, after = [], []
    for prompt in range(12):
        before += drawn(prompt=prompt, scores=(1, 1, 1, 0))
        after += drawn(prompt=prompt, scores=(1, 1, 0, 0) if prompt % 2 else (1, 1, 1, 0))
    folders = [write_run(tmp_path / name, held, sampling()) for name, held in (("a", before), ("b", after))]
    (row,) = compare(*folders, parse_gate([])).scores
    assert (row.samples, row.before, row.after, row.losses) == (12, 0.75, 0.625, 6)
    flat = [[answer(sample=n, score=mean(r.score for r in held[4 * n : 4 * n + 4])) for n in range(12)]
            for held in (before, after)]  # fmt: skip
    plain = [
        write_run(tmp_path / name, held, manifest(methods={"full": {}})) for name, held in zip("cd", flat, strict=True)
    ]
    (alike,) = compare(*plain, parse_gate([])).scores
    assert (row.low, row.high, row.p) == (alike.low, alike.high, alike.p)
    for changes, says in (
        ({"temperature": 1.0}, "config.sampling.temperature: 0.7 -> 1.0"),
        ({"top_p": 1.0}, "config.sampling.top_p"),
        ({"answers": 3}, "config.sampling.answers: 4 -> 3"),
        ({"sampling_seed": 1}, "config.sampling.sampling_seed"),
    ):
        other = write_run(tmp_path / says, after, sampling(**changes))
        with pytest.raises(SkvError, match=says):
            compare(folders[0], other, parse_gate([]))
    with pytest.raises(SkvError, match=r"config\.sampling\.temperature: 0\.7 -> None"):
        compare(folders[0], plain[0], parse_gate([]))


def test_every_form_of_a_run_says_how_it_was_drawn(tiny_folder, tmp_path, capsys):
    run(tiny_folder, tmp_path / "run", methods=METHODS[:2])
    out = tmp_path / "report"
    assert main(["report", str(tmp_path / "run"), "--out", str(out), "--export", "lm-eval", "--export", "parquet"]) == 0
    note = "3 answers per prompt, averaged per prompt before anything else, drawn at temperature 1.5, top-p 0.95"
    for name in ("report.html", "summary.md", "summary.csv", "tasks.csv", "passes.csv", "summary.tex"):
        assert note in (out / name).read_text(), name
    page = (out / "summary.md").read_text()
    assert "| method | length | prompts | pass@1 | 95 % | pass@3 | 95 % |" in page
    assert "sampling temperature 1.5, top_p 0.95, answers 3" in page
    exported = json.loads(next((out / "lm-eval").rglob("results_*.json")).read_text())
    assert exported["config"]["gen_kwargs"] == {"do_sample": True, "temperature": 1.5, "top_p": 0.95}
    task = next(iter(exported["configs"]))
    assert exported["configs"][task]["repeats"] == 3
    assert exported["n-samples"][task] == {"original": 2, "effective": 2}
    import pyarrow.parquet as pq

    assert note in pq.read_table(out / "samples.parquet").to_pylist()[0]["notes"]
    assert main(["leaderboard", str(tmp_path / "run"), "--out", str(tmp_path / "board")]) == 0
    board = (tmp_path / "board" / "leaderboard.md").read_text()
    assert "2 prompts x 3 at temperature 1.5, top-p 0.95" in board
    assert note in board


def test_a_ranking_holds_runs_drawn_alike_only(tmp_path):
    greedy = write_run(tmp_path / "greedy", grid(("full",), (1024,)), manifest(methods={"full": {}}))
    runs = [greedy]
    for name, changes in (("a", {}), ("b", {}), ("c", {"temperature": 1.0})):
        runs.append(write_run(tmp_path / name, drawn(scores=(1, 0, 1, 1)), sampling(**changes)))
    groups = rank(find_runs(runs)).groups
    assert sorted(len(group.runs) for group in groups) == [1, 1, 2]


def test_a_dry_run_counts_the_answers(tiny_folder, capsys):
    words = [
        "eval",
        "niah",
        "--haystack",
        "synthetic",
        "--lengths",
        "300",
        "--depths",
        "2",
        "--model",
        str(tiny_folder),
    ]
    assert main([*words, *METHODS[:4], *DRAWN, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (len(told["examples"]), told["answers"]) == (2, 12)
    assert main([*words, *METHODS[:4], *DRAWN, "--dry-run"]) == 0
    assert "2 prompts x 2 methods x 3 answers" in capsys.readouterr().out


def test_a_baseline_holds_every_answer_that_was_to_be_drawn(tmp_path):
    asked = {"lengths": [1024], "depths": [0, 100], "rounds": 1, "samples": None}
    described = replace(sampling(), selection=asked)
    records = [record for prompt in range(2) for record in drawn(prompt=prompt, scores=(1, 0, 1, 1))]
    for name, held, says in (("all", records, []), ("few", records[:-1], ["7 of 8 answers are there"])):
        folder = write_run(tmp_path / name, held, described)
        (folder / "summary.md").write_text("")
        assert unfit(folder, described) == says
