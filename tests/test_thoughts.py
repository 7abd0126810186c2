"""Thoughts before an answer: their markers are found and never guessed, they are not scored, and cut off ones told."""

from __future__ import annotations

import json

import pytest
from run_folders import answer
from test_chat import ALWAYS, DEEPSEEK, GRANITE, PLAIN, QWEN3, STRIPS, commands, templated, thinker  # noqa: F401

from cli.main import main
from evals.common.asking.thoughts import Markers, Thinking, find_markers, read_answer
from evals.common.chat import Chat
from evals.runs.results import read_run
from evals.tables.attempts import attempt_tables
from shadowkv.engine.engine import Engine

THINK = Markers("<think>", "</think>")


def with_tokens(template, *added, special=True):
    made = templated(template)
    made.add_tokens(list(added), special_tokens=special)
    return made


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- where a thought ends


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["<think>", "</think>"], THINK),
        (["a [THINK] b [/THINK] c"], Markers("[THINK]", "[/THINK]")),
        (["<|END_THINKING|><|START_THINKING|>"], Markers("<|START_THINKING|>", "<|END_THINKING|>")),
        (["◁think▷", "◁/think▷"], Markers("◁think▷", "◁/think▷")),
        (["<|begin_of_thought|>", "<|end_of_thought|>"], Markers("<|begin_of_thought|>", "<|end_of_thought|>")),
        (["<seed:think>", "</seed:think>"], Markers("<seed:think>", "</seed:think>")),
        (["message['reasoning_content'] </tool> <think>", "</reasoning>", "</think>"], THINK),
        (["content.split('</think>')[-1]"], Markers("", "</think>")),
        (["message['reasoning_content'] <think>"], None),
        ([], None),
    ],
)
def test_an_end_is_found_with_its_beginning(texts, found):
    assert find_markers(texts) == found


def test_markers_come_from_the_template_or_the_tokenizer_and_only_where_there_are_thoughts():
    assert Chat(templated(QWEN3), "on").markers == THINK
    assert Chat(templated(QWEN3)).markers is None, "switched off"
    assert Chat(templated(PLAIN)).markers is None
    assert Chat(with_tokens(PLAIN, "<think>", "</think>")).markers is None, "tokens alone make no thinker"
    assert Chat(templated(ALWAYS)).markers is None
    assert Chat(with_tokens(ALWAYS, "<think>", "</think>")).markers == THINK
    assert Chat(templated(STRIPS)).markers == Markers("", "</think>")
    assert Chat(templated(GRANITE), "on").markers == THINK


@pytest.mark.parametrize("template", [QWEN3, DEEPSEEK])
def test_a_prompt_begins_no_answer_where_a_thought_comes_first(template):
    assert Chat(templated(template)).text("Hi?", "It is").endswith("It is")
    assert not Chat(templated(template), "on").text("Hi?", "It is").endswith("It is")
    assert not Chat(templated(template), "on").next_turn("Hi?", "It is").endswith("It is")
    assert Chat(templated(ALWAYS)).text("Hi?", "It is").endswith("It is"), "as ever where nothing tells an end"


# ---- what is scored


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("added", [(), ("<think>", "</think>")])
def test_an_answer_is_what_comes_behind_its_thought(added, special):
    """Whether markers are tokens, special or not, or spelled out in bytes."""
    tokenizer = with_tokens(PLAIN, *added, special=special) if added else templated(PLAIN)
    begun, inside = Thinking(THINK, False, 99), Thinking(THINK, True, 99)

    def said(text, thinking):
        found = read_answer(tokenizer, ids(tokenizer, text), thinking)
        return found.prediction, found.meta.get("thought_cut")

    assert said("<think>Is it 5? </think>\n\nIt is 6.", begun) == ("It is 6.", False)
    assert said("\nIs it 5? </think>\n\nIt is 6.", inside) == ("It is 6.", False)
    assert said("Is it 5? Wait", inside) == ("", True)
    assert said("\n<think>Is it 5?", begun) == ("", True)
    assert said("It is 6.", begun) == ("It is 6.", None), "a model need not think"
    assert said("It is 6. </think>", Thinking(Markers("", "</think>"), False, 99))[1] is None
    assert said("a</think>b</think>c", inside)[0].startswith("b")
    assert read_answer(tokenizer, [], inside).prediction == ""


def test_the_tokens_of_a_thought_are_counted_and_an_answer_is_no_longer_for_a_short_one():
    tokenizer = with_tokens(PLAIN, "<think>", "</think>")
    tokens = [*ids(tokenizer, "<think>abc</think>"), *ids(tokenizer, "0123456789")]
    said = read_answer(tokenizer, tokens, Thinking(THINK, False, 4))
    assert (said.prediction, said.meta) == ("0123", {"thought_tokens": 5, "thought_cut": False, "answer_cut": True})
    said = read_answer(tokenizer, ids(tokenizer, "0123456789"), Thinking(THINK, False, 4))
    assert (said.prediction, said.meta) == ("0123", {"answer_cut": True})
    assert read_answer(tokenizer, tokens[:7], Thinking(THINK, False, 4)).meta.get("answer_cut") is None


# ---- runs


@pytest.fixture
def says(monkeypatch):
    """Every answer is this text, as far as the limit goes; the limits asked for are kept."""
    limits, tokenizer = [], templated(None)

    def script(text):
        def decode(self, cache, logits, max_new_tokens, *rest):
            limits.append(max_new_tokens)
            return [ids(tokenizer, text)[:max_new_tokens]]

        monkeypatch.setattr(Engine, "decode", decode)
        return limits

    return script


@pytest.mark.parametrize("name", ["niah", "turns", "ruler", "longbench", "v2"])
def test_every_command_scores_what_comes_behind_a_thought(thinker, commands, tmp_path, capsys, says, name):  # noqa: F811
    limits = says("<think>So long. </think> Ada (A).")
    words = ["eval", *commands[name], "-m", "full", "--model", thinker(QWEN3), "--thinking", "on", "-q"]
    assert main([*words, "--thinking-tokens", "40", "--out", str(tmp_path / "run")]) == 0
    manifest, records = read_run(tmp_path / "run")
    assert manifest.config["thinking_tokens"] == 40
    assert "thoughts are not scored, and may take 40 tokens beside the answer's" in manifest.notes
    expected = [" Ada (A)."[: limit - 40].lstrip() for limit in limits]
    assert [record.prediction for record in records] == expected
    assert all(record.meta["thought_tokens"] == 24 for record in records)
    assert all("It is" not in record.prompt_tail for record in records if name == "niah")
    assert "How answers ended" in (tmp_path / "run" / "summary.md").read_text()


def test_a_thought_that_the_limit_cuts_off_is_an_empty_answer_and_told(thinker, commands, tmp_path, says):  # noqa: F811
    says("<think>Ada, Ada, Ada, for so long that it does not end")
    words = ["eval", *commands["longbench"], "-m", "full", "--model", thinker(QWEN3), "--thinking", "on", "-q"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    _, (record,) = read_run(tmp_path / "run")
    assert (record.prediction, record.score, record.status, record.stopped) == ("", 0.0, "ok", False)
    assert record.meta["thought_cut"] is True
    assert "| full | 3500 | 1 of 1 | 1 of 1 | 32 |" in (tmp_path / "run" / "summary.md").read_text()


def test_tasks_without_the_template_have_no_thoughts(thinker, tmp_path, says):  # noqa: F811
    row = {"input": "x = ", "context": "y = 1", "answers": ["x = 1"], "length": 2, "all_classes": None}
    (tmp_path / "lcc.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row) + "\n")
    limits = says("<think>1</think>1")
    words = ["eval", "longbench", "--data", str(tmp_path), "--wording", "own", "--tasks", "hotpotqa,lcc", "-m", "full"]
    words += ["--model", thinker(QWEN3), "--thinking", "on", "--thinking-tokens", "100", "-q"]
    assert main([*words, "--max-prompt-tokens", "3000", "--out", str(tmp_path / "run")]) == 0
    said = {record.task: record.prediction for record in read_run(tmp_path / "run")[1]}
    assert said == {"hotpotqa": "1", "lcc": "<think>1</think>1"}
    assert sorted(limits) == [64, 132]


def test_what_cannot_be_thought_about_is_refused_in_a_line(thinker, commands, tmp_path, capsys):  # noqa: F811
    niah = ["eval", *commands["niah"], "-m", "full", "--out", str(tmp_path / "run")]
    for template, more, says in (
        (QWEN3, ["--thinking-tokens", "8"], "add --thinking on"),
        (PLAIN, ["--thinking-tokens", "8"], "leave it out"),
        (QWEN3, ["--thinking", "on", "--thinking-tokens", "0"], "at least 1, got 0"),
        (QWEN3, ["--thinking", "on", "--thinking-tokens", "999999"], "beyond this model's context"),
    ):
        assert main([*niah, "--model", thinker(template), *more]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert says in said[0]
    assert not (tmp_path / "run").exists()


def test_runs_without_thoughts_have_no_table_of_ends():
    assert attempt_tables([answer()], lambda _: True) == []
    told = attempt_tables([answer(meta={"depth": 0.0, "thought_tokens": 7, "thought_cut": True}, stopped=False)], bool)
    assert told[0].rows == [["full", "1k", "1 of 1", "1 of 1", "7"]]
