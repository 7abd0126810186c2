"""Several questions on one cache: prompts, the same tokens as without a cache, and records that survive anything."""

from __future__ import annotations

import json
import re

import pytest
import torch
from test_niah import BYTES, tokenizer  # noqa: F401 - a fixture

from cli.main import main
from evals.niah.report import niah_tables
from evals.niah.turns import MultiTurnNiah
from evals.runs.results import read_run
from evals.runs.runner import one_ahead
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full
from shadowkv.models.loading import load_tokenizer


def grid(**changes):
    settings = {"lengths": (2048,), "depths": (0.0, 25.0, 50.0, 75.0, 100.0), "haystack_spec": "synthetic", "turns": 4}
    return MultiTurnNiah(**{**settings, **changes})


@pytest.mark.parametrize("in_prefill", [False, True])
def test_every_turn_asks_for_a_needle_of_the_text(tokenizer, in_prefill):  # noqa: F811
    for example in grid(first_query_in_prefill=in_prefill).examples(tokenizer):
        asked = [turn for turn in example.turns if turn.references]
        assert len(asked) == 4
        assert (example.references != ()) is in_prefill
        text = tokenizer.decode(example.input_ids)
        facts = dict(re.findall(r"The magic number of (\w+) is (\d{7})\.", text))
        assert len(facts) == 4
        for turn in asked:
            place = re.findall(r"The magic number of (\w+) is$", tokenizer.decode(turn.input_ids))[0]
            assert turn.references == (facts[place],)
        used = sum(len(turn.input_ids) for turn in example.turns) + 4 * 16
        assert 0.95 * 2048 <= used <= 2048
        assert len({turn.meta["depth"] for turn in asked}) == 4


def test_both_ways_ask_the_same(tokenizer):  # noqa: F811
    apart, together = (list(grid(first_query_in_prefill=way).examples(tokenizer)) for way in (False, True))
    for one, other in zip(sorted(apart, key=str), sorted(together, key=str), strict=True):
        first, *later = one.later
        assert one.input_ids + first.input_ids == other.input_ids
        assert first.references == other.references
        assert later == list(other.later)


def test_any_subset_reproduces_and_few_depths_are_enough():
    made = load_tokenizer(BYTES)
    everything = {e.sample: e for e in grid().examples(made)}
    wanted = grid().questions(made)[7]
    assert list(grid().examples(made, [wanted])) == [everything[wanted.sample.rpartition(",turn=")[0]]]
    depths = [t.meta["depth"] for t in next(grid(depths=(50.0,)).examples(made)).later]
    assert len(set(depths)) == 4
    with pytest.raises(SkvError, match="--turns of at least 2"):
        grid(turns=1)
    with pytest.raises(SkvError, match="at most 26"):
        grid(turns=27, lengths=(8192,)).questions(made)
    with pytest.raises(SkvError, match="leaves no room for a haystack"):
        grid(lengths=(400,)).questions(made)


@pytest.mark.parametrize("spec", ["full", "shadowkv:rank=32,budget=1024", "kivi:group=16,residual=1024"])
def test_a_conversation_is_what_it_would_be_without_a_cache(tiny, spec):
    """Answers of each turn equal those to the whole conversation so far, computed from scratch."""
    engine, method = Engine(tiny("llama"), prefill_chunk_tokens=64), parse_method(spec)
    fresh = Engine(engine.model, prefill_chunk_tokens=64)
    parts = [torch.randint(0, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in (150, 20, 9)]
    cache = engine.replay(engine.prefill(parts[0]), method)
    said, unfed = parts[0], []
    for part in parts[1:]:
        logits = engine.extend(cache, torch.cat((torch.tensor([unfed], dtype=torch.long), part), dim=1))
        answer = engine.decode(cache, logits, 6)[0]
        unfed = answer[-1:]
        said = torch.cat((said, part), dim=1)
        assert answer == fresh.generate(said, Full(), 6)[0]
        said = torch.cat((said, torch.tensor([answer])), dim=1)


def test_a_run_with_turns_continues_where_it_was_cut(tiny_folder, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["eval", "niah", "--model", str(tiny_folder), "-m", "full", "-m", "snapkv:budget=64", "--turns", "3"]
    argv += ["--lengths", "1k", "--depths", "2", "--haystack", "synthetic", "--max-new-tokens", "4", "--out", str(run)]
    assert main(argv) == 0
    assert "Score by turn" in capsys.readouterr().out
    assert (run / "plots" / "score_by_turn.png").exists()
    whole = {r.key: (r.tokens, r.score) for r in read_run(run)[1]}
    assert len(whole) == 2 * 2 * 3
    lines = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    (run / "samples.jsonl").write_text("".join(lines[:4] + lines[5:9]))
    assert main([*argv, "-q"]) == 0
    assert {r.key: (r.tokens, r.score) for r in read_run(run)[1]} == whole
    assert len((run / "samples.jsonl").read_text().splitlines()) == len(whole)
    assert main([*argv[:-2], "--out", str(tmp_path / "other"), "--first-query-in-prefill", "-q"]) == 0
    assert len(read_run(tmp_path / "other")[1]) == 12
    asked = json.loads((tmp_path / "other" / "run.json").read_text())["config"]
    assert asked["turns"] == 3
    assert asked["first_query_in_prefill"] is True


def test_a_turn_that_fails_takes_only_those_after_it(tiny_folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    argv = ["eval", "niah", "--model", str(tiny_folder), "-m", "full", "--turns", "3", "--lengths", "1k"]
    argv += ["--depths", "1", "--haystack", "synthetic", "--max-new-tokens", "4", "--out", str(run), "-q"]
    real, calls = Engine.extend, []

    def failing(self, cache, ids):
        if ids.shape[1] > 1:
            calls.append(ids.shape[1])
        if len(calls) == 2 and ids.shape[1] > 1:
            raise RuntimeError("out of luck")
        return real(self, cache, ids)

    monkeypatch.setattr(Engine, "extend", failing)
    assert main(argv) == 1
    assert [r.status for r in read_run(run)[1]] == ["ok", "error", "error"]
    monkeypatch.undo()
    assert main(argv) == 0
    assert [r.status for r in read_run(run)[1]] == ["ok", "ok", "ok"]


def test_scores_are_shown_by_turn():
    from test_results import RECORD, replace

    rows = [
        replace(RECORD, sample=f"depth=0,round=0,turn={t}", score=s, meta={"depth": 0.0, "round": 0, "turn": t})
        for t, s in ((1, 1.0), (2, 0.0))
    ]
    assert niah_tables(rows)[0].rows == [["full", "1k", "1.00", "0.00"]]
    assert niah_tables([RECORD]) == []


def test_items_are_made_one_ahead_and_errors_come_through():
    made = []

    def items():
        for i in range(3):
            made.append(i)
            yield i
        raise SkvError("no more")

    seen: list[int] = []
    with pytest.raises(SkvError, match="no more"):
        seen.extend(one_ahead(items()))
    assert made == [0, 1, 2]
