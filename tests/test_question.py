"""Where the question stands: the same tokens in two parts, the text alone in a method's hands, and rows that say so."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import product
from types import SimpleNamespace

import longbench_rows
import pandas as pd
import pytest
import torch
from compare_folders import answers, run_folder
from run_folders import write_run
from test_cli import mistake
from test_niah import BYTES
from test_ruler import WORDINGS

from cli.main import main
from evals.common.asking.question import first_character, first_token, method_of, shown
from evals.longbench.task import LongBench
from evals.longbench.tasks import TASKS as LONGBENCH
from evals.longbench.v2 import LongBenchV2
from evals.niah.task import Niah
from evals.niah.turns import MultiTurnNiah
from evals.reporting.folders import find_runs
from evals.reporting.leaderboard import rank
from evals.ruler.files import RulerFiles, write_files
from evals.ruler.task import Ruler
from evals.ruler.tasks import TASKS as RULER
from evals.runs.diagnostics import diagnose
from evals.runs.results import Record, read_run
from evals.runs.wrapping.placed import asked_after, asking
from evals.tables.curves import curves
from evals.tables.summary import agreement, summarise
from shadowkv.anatomy import forward
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.models.loading import load_tokenizer
from shadowkv.models.packs import pack_path
from shadowkv.models.resolving import resolve

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
V2_ROW = {
    "question": "Who counted the crates?", "choice_A": "Anna", "choice_B": "Ben", "choice_C": "Cem", "choice_D": "Dina",
    "answer": "B", "context": "Ben counted twelve crates. " * 30, "difficulty": "easy", "length": "short",
}  # fmt: skip


@cache
def loaded(name):
    return load_tokenizer(BYTES if name == "bytes" else resolve(name))


def tokenizers():
    """Two tokenizers, or what is here of them, each with a chat template and without one."""
    names = [name for name in ("smollm2-135m", "gemma3-270m") if pack_path(name) is not None]
    for made in map(loaded, names or ["bytes"]):
        for made.chat_template in (TEMPLATE, None):
            yield made


def held(task, made):
    """Every prompt of a task in two parts, whose tokens are those of the prompt; decoded, the text and what follows."""
    parts = []
    for one in task.examples(made):
        other = asked_after(one)
        text, asked = other.turns[:2]
        assert text.references == ()
        assert (*text.input_ids, *asked.input_ids) == one.input_ids == asked.prompt_ids
        assert asked.references == one.references
        assert (asked.stop_ids, asked.min_new_tokens) == (one.stop_ids, one.min_new_tokens)
        assert other.turns[2:] == tuple(replace(turn, place="after") for turn in one.later)
        assert {turn.place for turn in other.turns} == {"after"}
        assert other.questions == tuple(q._replace(place="after") for q in one.questions)
        parts.append((made.decode(text.input_ids), made.decode(asked.input_ids)))
    assert parts
    return parts


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("task", RULER)
def test_prompts_of_ruler_are_cut_before_their_question(task, wording):
    run = Ruler((4096,), (task,), samples=1, wording=wording)
    for tokenizer in tokenizers():
        ((example, _, question),) = run.made(tokenizer)
        ((text, asked),) = held(SimpleNamespace(examples=lambda _, made=example: [made]), tokenizer)
        assert question in asked
        assert text.count(question) == (task == "cwe"), "whose solved example asks the same"
        # The token that holds both sides may add a sign or two of the text.
        assert len(asked[: asked.index(question)].strip()) < 8
        assert asked.rstrip().endswith(str(example.meta["answer_prefix"]).rstrip())


OFFICIAL = pytest.param(
    "official", marks=pytest.mark.skipif(pack_path("longbench") is None, reason="longbench is not pulled")
)


@pytest.mark.parametrize("wording", ["own", OFFICIAL])
@pytest.mark.parametrize("task", LONGBENCH)
def test_prompts_of_longbench_are_cut_before_their_question(tmp_path, task, wording):
    folder = longbench_rows.write(tmp_path / "rows", (task,))
    code = LONGBENCH[task].category == "code"
    # Whole, and with its middle lost.
    for most, tokenizer in product((7500, 300 if code else 420), tokenizers()):
        run = LongBench((task,), most, data=str(folder), wording=wording)
        assert bool(run.notes_after()) == (code or "{input}" not in run._templates.by_task[task])
        for row, (text, asked) in zip(longbench_rows.rows(task), held(run, tokenizer), strict=True):
            behind = run._templates.by_task[task].rpartition("{input}" if task == "repobench-p" else "{context}")[2]
            question = behind.format(input=row["input"]).strip()
            assert question in asked
            assert len(asked[: asked.index(question)].strip()) < 8
            if "{input}" in behind:
                assert row["input"] not in text


def test_prompts_of_longbench_v2_are_cut_before_their_question(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([V2_ROW]))
    for tokenizer in tokenizers():
        ((text, asked),) = held(LongBenchV2(7500, data=str(path)), tokenizer)
        assert "Question: Who counted" in asked
        assert "crates." in text
        assert "(A) Anna" in asked


@pytest.mark.parametrize("spec", ["synthetic", "file", "kamradt", "turns"])
def test_needle_prompts_are_cut_before_their_question(tmp_path, spec):
    book = tmp_path / "book.txt"
    book.write_text("It was raining. The ferry had left. " * 200)
    if spec == "kamradt" and pack_path("essays") is None:
        pytest.skip("essays are not pulled")
    grid = {"lengths": (1024,), "depths": (0.0, 60.0), "haystack_spec": str(book) if spec == "file" else "synthetic"}
    task = Niah(**grid, protocol="kamradt" if spec == "kamradt" else "magic-number")
    if spec == "turns":
        task = MultiTurnNiah(**grid, turns=3, first_query_in_prefill=True)
    for tokenizer in tokenizers():
        for text, asked in held(task, tokenizer):
            assert asked.lstrip().startswith("What is the ")
            assert "What is the " not in text[-300:]


def test_a_token_of_both_sides_belongs_to_the_question():
    """Whatever a tokenizer merges over the boundary, and nothing more."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["a", "b", "?", "ab", "b?", "abb"]
    merges = [("b", "?"), ("a", "b"), ("ab", "b")]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=made)

    def ids_of(text):
        return made(text)["input_ids"]

    assert made.convert_ids_to_tokens(ids_of("aabb??")) == ["a", "ab", "b?", "?"]
    assert [first_token(made, ids_of, "aabb??", at) for at in range(7)] == [0, 1, 1, 2, 2, 3, 4]
    assert first_token(made, ids_of, "aabb??", -1) == 0
    assert first_character("<u> read. \nWhat? </u>", " read. \nWhat? ", "\nWhat? ") == 11
    assert first_character("What? <u>READ.\n\nWhat?</u>", "read. What?", "What?") == 16
    assert first_character("read. Wha", "read. Wha", "What?") == -1


def test_what_cannot_be_cut_is_refused_in_a_line(tmp_path):
    made, rows = load_tokenizer(BYTES), longbench_rows.write(tmp_path / "rows", ("hotpotqa", "lcc"))
    gone = LongBench(("hotpotqa",), 60, data=str(rows), wording="own")
    with pytest.raises(SkvError, match="hotpotqa row=0 does not hold a text and, whole and behind it, a question"):
        list(asking(gone, "after").examples(made))
    before = tmp_path / "templates.json"
    before.write_text(json.dumps({"hotpotqa": "{input}\n{context}\nAnswer:", "lcc": "{context}"}))
    for task in ("hotpotqa", "lcc"):
        run = LongBench((task,), 7500, data=str(rows), wording=str(before))
        with pytest.raises(SkvError, match=f"the template of {task} asks nothing behind its text"):
            asking(run, "both").questions(made)
    template = tmp_path / "0shot.txt"
    template.write_text("$Q$ $C_A$ $C_B$ $C_C$ $C_D$ $DOC$ Answer:")
    (tmp_path / "data.json").write_text(json.dumps([V2_ROW]))
    v2 = LongBenchV2(7500, data=str(tmp_path / "data.json"), wording=str(template))
    with pytest.raises(SkvError, match="asks before its text"):
        asking(v2, "after").questions(made)
    unknown = replace(next(Niah((1024,), (0.0,), "synthetic").examples(made)), asked_from=None)
    with pytest.raises(SkvError, match="does not say where its question begins"):
        asked_after(unknown)


def test_files_say_where_their_question_begins_or_are_refused(tmp_path):
    made = load_tokenizer(BYTES)
    run = Ruler((2048,), ("vt", "qa_1"), samples=2, wording="own")
    paths = write_files(run, made, tmp_path)
    files = RulerFiles(tmp_path, (), tuple(RULER))
    assert sorted(held(files, made)) == sorted(held(run, made))
    line = json.loads(paths[0].read_text().splitlines()[0])
    del line["question"]
    paths[0].write_text(json.dumps(line) + "\n")
    with pytest.raises(SkvError, match=r"2048/vt/validation\.jsonl, line=1, does not say where its question begins"):
        asking(RulerFiles(tmp_path, (), tuple(RULER)), "after").questions(made)
    paths[0].write_text(json.dumps({**line, "question": "Why?"}) + "\n")
    with pytest.raises(SkvError, match="line 1: 'question' is not a part of 'input'"):
        RulerFiles(tmp_path, (), tuple(RULER)).questions(made)


@pytest.fixture
def prefilled(monkeypatch):
    """How many tokens were computed, chunk by chunk, but for single decoded ones."""
    counted, real = [], forward.last_logits

    def counting(model, ids, *rest, **more):
        counted.append(ids.shape[1])
        return real(model, ids, *rest, **more)

    monkeypatch.setattr("shadowkv.engine.engine.last_logits", counting)
    return counted


def test_a_prompt_that_is_the_one_held_is_not_computed_again(tiny, prefilled):
    engine = Engine(tiny("llama"), prefill_chunk_tokens=64)
    ids = torch.randint(0, 90, (1, 200), generator=torch.Generator().manual_seed(1))
    first = engine.prefill(ids)
    expected = engine.generate(ids, parse_method("snapkv:budget=64"), 6)
    del prefilled[:]
    again = engine.prefill(ids.clone())
    assert prefilled == []
    assert again.reused_tokens == 200
    assert engine.decode(engine.replay(again, parse_method("snapkv:budget=64")), again.logits, 6) == expected
    with pytest.raises(ValueError, match="replaced by a later one"):
        engine.replay(first, parse_method("full"))


def run_niah(folder, run, *more):
    argv = ["eval", "niah", "--model", str(folder), "-m", "full", "-m", "snapkv:budget=64", "--lengths", "1k"]
    argv += ["--depths", "2", "--haystack", "synthetic", "--max-new-tokens", "4", "--out", str(run), *more]
    return main(argv)


def test_both_are_rows_of_one_run_and_the_text_is_all_a_method_is_given(tiny_folder, tmp_path, capsys, prefilled):
    run, alone, usual = (tmp_path / name for name in ("both", "after", "usual"))
    assert run_niah(tiny_folder, run, "--question", "both", "--prefill-chunk", "64") == 0
    shown_now = capsys.readouterr().out
    assert "snapkv:budget=64 · question after" in shown_now
    assert "[question in the prompt, and after]" in shown_now
    assert "the text alone is what methods take over" in shown_now
    records = read_run(run)[1]
    assert len(records) == len({r.key for r in records}) == 8
    by = {(r.sample, r.question, r.method): r for r in records}
    for sample in {r.sample for r in records}:
        whole, after = (by[sample, place, "full"] for place in ("in-prompt", "after"))
        assert whole.tokens == after.tokens, "full attention does not care"
        assert whole.prompt_sha256 == after.prompt_sha256
        assert whole.prompt_tail == after.prompt_tail
        assert whole.prompt_tokens == after.prompt_tokens
        assert after.reused_tokens >= 64, "the text was computed as a part of the prompt"
        whole, after = (by[sample, place, "snapkv:budget=64"] for place in ("in-prompt", "after"))
        assert whole.attended_tokens < after.attended_tokens < after.prompt_tokens, "the question is kept on top"
        assert after.device_bytes > whole.device_bytes
    # The same command continues, either part of it gives the same answers, and the usual run knows nothing of it.
    before = (run / "samples.jsonl").read_text()
    assert run_niah(tiny_folder, run, "--question", "both", "--prefill-chunk", "64", "-q") == 0
    assert (run / "samples.jsonl").read_text() == before
    assert run_niah(tiny_folder, alone, "--question", "after", "--prefill-chunk", "64", "-q") == 0
    assert run_niah(tiny_folder, usual, "--prefill-chunk", "64", "-q") == 0
    for part in (alone, usual):
        for record in read_run(part)[1]:
            assert record.tokens == by[record.sample, record.question, record.method].tokens
    assert {r.question for r in read_run(alone)[1]} == {"after"}
    assert {r.question for r in read_run(usual)[1]} == {"in-prompt"}
    config = {part.name: json.loads((part / "run.json").read_text())["config"] for part in (run, alone, usual)}
    assert "question" not in config["usual"]
    assert (config["both"]["question"], config["after"]["question"]) == ("both", "after")
    capsys.readouterr()
    assert "holds a run of another configuration" in mistake(
        capsys, "eval", "niah", "--model", str(tiny_folder), "-m", "full", "--lengths", "1k", "--depths", "2",
        "--haystack", "synthetic", "--max-new-tokens", "4", "--out", str(usual), "--question", "after",
        "--prefill-chunk", "64",
    )  # fmt: skip


def test_turns_can_begin_after_the_text_by_name(tiny_folder, tmp_path, capsys):
    turns = ("--turns", "3", "-q")
    assert run_niah(tiny_folder, tmp_path / "default", *turns) == 0
    assert run_niah(tiny_folder, tmp_path / "both", *turns, "--question", "both") == 0
    assert run_niah(tiny_folder, tmp_path / "in", *turns, "--first-query-in-prefill") == 0
    default, both, inside = (read_run(tmp_path / name)[1] for name in ("default", "both", "in"))
    tokens = {(r.question, r.sample, r.method): r.tokens for r in both}
    assert len(tokens) == len(default) + len(inside)
    assert {tuple(tokens["after", r.sample, r.method]) == tuple(r.tokens) for r in default} == {True}
    assert {tuple(tokens["in-prompt", r.sample, r.method]) == tuple(r.tokens) for r in inside} == {True}
    asked = ("eval", "niah", "--model", str(tiny_folder), "--question")
    assert "give one" in mistake(capsys, *asked, "after", "--first-query-in-prefill", "--turns", "2")
    assert "unknown --question 'befor'" in mistake(capsys, *asked, "befor")


def test_what_several_questions_are_about_is_computed_once(tiny_folder, tmp_path, monkeypatch):
    """LongBench's rows about one text, far from each other in their file."""
    first, second = longbench_rows.rows("hotpotqa")
    lines = [{**(first if n % 2 else second), "input": f"Who was number {n}?"} for n in range(6)]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "hotpotqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prefills, real = [], Engine.prefill
    monkeypatch.setattr(Engine, "prefill", lambda *given: prefills.append(real(*given)) or prefills[-1])
    argv = ["eval", "longbench", "--model", str(tiny_folder), "--data", str(tmp_path / "rows"), "--tasks", "hotpotqa"]
    argv += ["--wording", "own", "-m", "full", "-m", "snapkv:budget=64", "--prefill-chunk", "64", "--no-self-check"]
    assert main([*argv, "--question", "after", "--out", str(tmp_path / "run"), "-q"]) == 0
    assert len(read_run(tmp_path / "run")[1]) == 12
    computed = [prefill.prompt_tokens - prefill.reused_tokens for prefill in prefills]
    assert len(computed) == 6
    assert computed[0] == prefills[0].prompt_tokens
    assert computed[1:3] == computed[4:] == [0, 0]
    assert computed[3] < 200, "the texts begin alike"
    del prefills[:]
    assert main([*argv, "--out", str(tmp_path / "usual"), "-q"]) == 0
    assert sum(p.prompt_tokens - p.reused_tokens for p in prefills) > sum(computed), "the questions are in there"


def test_diagnostics_are_of_the_answer(tiny):
    """The question goes through the cache first: recall by hand is the mass behind it too."""
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128, record_queries=True)
    prompt = torch.randint(0, 90, (1, 200), generator=torch.Generator().manual_seed(3))
    question = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(4))
    prefill = engine.prefill(prompt)
    exact = diagnose(engine, prefill, parse_method("snapkv:budget=999"), 4, (), question[0].tolist())
    assert max(exact.output_error) < 1e-3
    assert all(recall is None or recall > 0.999 for recall in exact.recall)
    found = diagnose(engine, prefill, parse_method("streaming:budget=40,sinks=4,rerotate=false"), 2, (),
                     question[0].tolist())  # fmt: skip
    whole = torch.cat((prompt, question), dim=1)
    token = engine.prefill(whole).logits.argmax(dim=-1, keepdim=True)
    model = engine.model
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = model(torch.cat((whole, token), dim=1), output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    for layer, recall in enumerate(found.recall):
        last = weights[layer][0, :, -1]
        assert recall == pytest.approx(float((last[:, :4].sum(-1) + last[:, -36:].sum(-1)).mean()), abs=1e-4)


def test_a_run_with_diagnostics_has_them_after_the_text_too(tiny_folder, tmp_path):
    assert run_niah(tiny_folder, tmp_path / "run", "--question", "after", "--diagnostics", "-q") == 0
    records = read_run(tmp_path / "run")[1]
    assert all(len(r.meta["diagnostics"]["output_error"]) > 0 for r in records)
    assert "question after" in (tmp_path / "run" / "summary.md").read_text()


def both(records):
    """The same answers in the prompt, and half as good after it."""
    after = [replace(r, question="after", score=None if r.score is None else r.score / 2) for r in records]
    return [*records, *after]


def test_only_answers_that_were_asked_for_alike_are_compared(tmp_path, capsys):
    asked = {"config": {"seed": 0, "question": "both"}}
    old = run_folder(tmp_path / "old", answers([1.0] * 20), config={"seed": 0})
    new = run_folder(tmp_path / "new", both(answers([1.0] * 20)), **asked)
    after = run_folder(tmp_path / "after", both(answers([1.0] * 20))[20:], config={"seed": 0, "question": "after"})
    said = []
    for one, other in ((old, new), (new, old), (new, after), (new, new)):
        assert main(["compare", str(one), str(other)]) == 0
        said.append(capsys.readouterr().out)
    assert "20 answers with the question after are only in CURRENT and left out" in " ".join(said[0].split())
    assert "20 answers with the question after are only in BASELINE and left out" in " ".join(said[1].split())
    assert "20 answers are only in BASELINE and left out" in " ".join(said[2].split())
    assert "question after" in said[3]
    assert "mean of" not in said[3], "nothing is averaged over the two"
    assert main(["compare", str(old), str(after)]) == 2
    assert "no sample in common" in capsys.readouterr().err


def test_old_records_are_of_questions_in_the_prompt(tmp_path):
    folder = run_folder(tmp_path / "run", answers([1.0, 0.0]))
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        del line["question"]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {r.question for r in read_run(folder)[1]} == {"in-prompt"}
    assert all(isinstance(r, Record) for r in read_run(folder)[1])


def test_rankings_are_of_one_setting(tmp_path):
    from run_folders import METHODS, grid, manifest

    run = write_run(tmp_path / "run", both(grid(METHODS, [1024])), manifest(config={"seed": 0, "question": "both"}))
    alone = write_run(tmp_path / "usual", grid(METHODS, [1024]), manifest())
    usual, after = rank(find_runs([run, alone])).groups
    assert "question" not in usual.title
    assert list(usual.runs) == ["run", "usual"]
    assert "[question after]" in after.title
    assert list(after.runs) == ["run"]
    assert [row[3] for row in after.table.rows] == ["50.0", "25.0", "25.0"]
    assert after.table.rows[0][8] == "100.0", "of full attention's, asked alike"


def test_exports_and_pages_name_it(tmp_path):
    from run_folders import METHODS, grid, manifest

    run = write_run(tmp_path / "run", both(grid(METHODS, [1024])), manifest(config={"seed": 0, "question": "both"}))
    assert main(["report", str(run), "--export", "lm-eval", "--export", "parquet"]) == 0
    for name in ("summary.md", "summary.csv", "tasks.csv", "summary.tex", "report.html"):
        assert (
            "full · question after" in (run / name).read_text()
            or r"full $\cdot$ question after" in (run / name).read_text()
        ), name
    told = json.loads(next(run.rglob("full/results_*.json")).read_text())
    assert told["results"]["skv_niah_magic-number_1024"]["score,none"] == 1.0
    assert told["results"]["skv_niah_after_magic-number_1024"]["score,none"] == 0.5
    assert told["groups"]["skv_niah_after_1024"]["score,none"] == 0.5
    assert told["configs"]["skv_niah_after_magic-number_1024"]["metadata"]["question"] == "after"
    rows = pd.read_parquet(run / "samples.parquet")
    assert rows.question.value_counts().to_dict() == {"in-prompt": 12, "after": 12}


def test_rows_are_summed_up_apart():
    from run_folders import grid

    from evals.tables.summary import shown_records

    rows = {row.method: row for row in summarise(shown_records(both(grid(["full", "quest:budget=64"], [1024]))))}
    assert list(rows) == ["full", "quest:budget=64", "full · question after", "quest:budget=64 · question after"]
    assert rows["quest:budget=64 · question after"].score == 0.25
    assert rows["quest:budget=64"].agreement == 0.5
    assert rows["quest:budget=64 · question after"].agreement == pytest.approx(2 / 3), "the first token counts"
    assert agreement([1, 2], [9, 2]) == 1.0
    assert agreement([1, 2], [9, 2], first=0) == 0.5
    assert method_of(shown("full", "after")) == "full"
    labels = [shown(f"snapkv:budget={n}", place) for place in ("in-prompt", "after") for n in (64, 128)]
    assert curves(labels) == {
        "snapkv by budget": labels[:2],
        "snapkv · question after by budget": labels[2:],
    }
