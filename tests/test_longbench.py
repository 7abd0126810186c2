"""LongBench by its authors' rules: templates, truncation, stops, metrics, averages; and rows from anywhere."""

from __future__ import annotations

import json
import zipfile

import longbench_rows
import pytest
from test_results import RECORD, replace

from cli.main import main
from evals.common.seeding import seeded
from evals.longbench import metrics
from evals.longbench.prompts import templates
from evals.longbench.report import longbench_tables, v2_tables
from evals.longbench.task import LongBench
from evals.longbench.tasks import E_TASKS, SIXTEEN, TASKS
from evals.longbench.truncation import checked_limit, without_middle
from evals.longbench.v2 import LongBenchV2, named_choice
from evals.runs.results import read_run
from shadowkv.common.errors import SkvError
from shadowkv.models.loading import load_tokenizer
from shadowkv.models.packs import pack_path
from shadowkv.models.presets import find_preset
from shadowkv.models.resolving import ModelSource

needs_pack = pytest.mark.skipif(pack_path("longbench") is None, reason="longbench is not pulled")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))


@pytest.fixture
def folder(tmp_path):
    return longbench_rows.write(tmp_path / "rows")


def bench(folder, *tasks, **changes):
    settings = {"tasks": tasks or tuple(TASKS), "max_prompt_tokens": 7500, "data": str(folder), "wording": "own"}
    return LongBench(**{**settings, **changes})


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_score_one_and_silence_nothing(tokenizer, folder, task):
    benchmark = bench(folder, task)
    made = list(benchmark.examples(tokenizer))
    assert len({e.question for e in made}) == 2
    assert made == list(bench(folder, task).examples(tokenizer)), "the same rows give the same prompts"
    for example in made:
        # The rouge package divides by (p + r + 1e-8), so its best score is a little below 1.
        assert benchmark.score(example, example.references[0]) == pytest.approx(1.0, abs=1e-8)
        assert benchmark.score(example, "") == 0.0
        assert example.max_new_tokens == TASKS[task].max_new_tokens


def test_the_tables_of_tasks_are_the_papers():
    assert len(TASKS) == 21
    assert len(E_TASKS) == 13
    assert len(SIXTEEN) == 16
    assert sum(not spec.chat for spec in TASKS.values()) == 6
    assert {name for name, spec in TASKS.items() if spec.first_line} == {"trec", "triviaqa", "samsum", "lsht"}


@needs_pack
def test_templates_are_the_official_ones_to_the_byte():
    made = templates("official", TASKS)
    assert made.official
    assert made.by_task["2wikimqa"] == made.by_task["musique"] == made.by_task["hotpotqa"]


def test_a_users_copy_of_the_templates_is_recognised(tmp_path):
    path = tmp_path / "dataset2prompt.json"
    path.write_text(json.dumps({"lcc": "Next:\n{context}"}))
    made = templates(str(path), ["lcc"])
    assert not made.official
    assert len(made.described["sha256"]) == 64
    with pytest.raises(SkvError, match=r"no text with \{context\} for trec"):
        templates(str(path), ["trec"])
    path.write_text(json.dumps({"lcc": "{context} {question}"}))
    with pytest.raises(SkvError, match="has other fields"):
        templates(str(path), ["lcc"])
    path.write_text("[")
    with pytest.raises(SkvError, match="are not JSON"):
        templates(str(path), ["lcc"])
    with pytest.raises(SkvError, match="--wording takes official, own or a file"):
        templates("offical", ["lcc"])
    if pack_path("longbench") is not None:
        path.write_text(json.dumps(templates("official", TASKS).by_task))
        assert templates(str(path), TASKS).official


def test_long_prompts_lose_their_middle(tokenizer):
    text = "".join(map(str, range(1000)))
    assert without_middle(tokenizer, text, 5000) == text
    cut = without_middle(tokenizer, text, 101)
    assert cut == text[:50] + text[-50:], "an odd limit loses one token more, as int(limit / 2) does"


@pytest.mark.parametrize(("context", "limit"), [(4096, 3500), (8192, 7500), (16384, 15500), (32768, 31500)])
def test_the_limits_are_the_authors(context, limit):
    assert checked_limit(None, context) == limit
    assert checked_limit(1000, context) == 1000
    with pytest.raises(SkvError, match="no room for template and answer"):
        checked_limit(context, context)


def test_truncation_comes_before_the_chat_template(folder):
    tokenizer = load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))
    tokenizer.chat_template = "<u>{{ messages[0]['content'] }}</u><a>"
    for task, wrapped in (("hotpotqa", True), ("lcc", False)):
        example = next(bench(folder, task, max_prompt_tokens=300).examples(tokenizer))
        text = tokenizer.decode(example.input_ids)
        assert len(text) == 300 + wrapped * len("<u></u><a>")
        assert text.startswith("<u>") is wrapped
        assert text.endswith("</u><a>") is wrapped


def test_a_prompt_without_a_chat_template_has_no_end(folder):
    """A tokenizer that ends every text would have the model go on with something else than the answer."""
    from tokenizers import processors

    made = load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))
    made.eos_token = "?"
    special = [(mark, made.convert_tokens_to_ids(mark)) for mark in "!?"]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="! $A ?", special_tokens=special)
    for task in ("hotpotqa", "lcc"):
        ids = next(bench(folder, task).examples(made)).input_ids
        assert made.decode(ids).startswith("!")
        assert not made.decode(ids).endswith("?")


def test_samsum_stops_at_a_line_break_after_at_least_one_token(tokenizer, folder):
    newline = tokenizer("\n")["input_ids"][-1]
    for task in TASKS:
        example = next(bench(folder, task).examples(tokenizer))
        assert (example.stop_ids, example.min_new_tokens) == (((newline,), 1) if task == "samsum" else ((), 0))


def test_no_stop_token_is_taken_before_the_least_number_of_tokens(tiny):
    import torch
    from tiny_models import random_prompt

    from shadowkv.engine.engine import Engine
    from shadowkv.methods.full.method import Full

    engine = Engine(tiny("llama"))
    prefill = engine.prefill(random_prompt(40))
    free = engine.decode(engine.replay(prefill, Full()), prefill.logits, 5)[0]
    assert engine.decode(engine.replay(prefill, Full()), prefill.logits, 5, {free[0]})[0] == []
    held = engine.decode(engine.replay(prefill, Full()), prefill.logits, 5, {free[0]}, min_new_tokens=1)[0]
    assert held[0] == int(prefill.logits[0].topk(2).indices[1])
    assert torch.isfinite(prefill.logits).all(), "the prefill's logits are not written to"


def test_short_rows_can_be_left_out(tokenizer, folder):
    lengths = [len(e.input_ids) for e in bench(folder, "hotpotqa", "lcc").examples(tokenizer)]
    benchmark = bench(folder, "hotpotqa", "lcc", min_tokens=min(lengths))
    assert len(benchmark.questions(tokenizer)) == sum(n > min(lengths) for n in lengths) < 4
    assert any("more than" in note for note in benchmark.notes())
    with pytest.raises(SkvError, match="no row has a prompt of more than"):
        bench(folder, "lcc", min_tokens=10**6).questions(tokenizer)


def test_e_reads_its_own_files(tokenizer, tmp_path):
    folder = longbench_rows.write(tmp_path, E_TASKS, "_e")
    benchmark = bench(folder, "hotpotqa", "lcc", e=True)
    made = list(benchmark.examples(tokenizer))
    assert [(e.task, e.meta["bucket"]) for e in made] == [
        ("hotpotqa_e", "0-4k"), ("hotpotqa_e", "4-8k"), ("lcc_e", "0-4k"), ("lcc_e", "4-8k"),
    ]  # fmt: skip
    assert benchmark.score(made[0], made[0].references[0]) == 1.0
    with pytest.raises(SkvError, match="LongBench-E has no narrativeqa"):
        bench(folder, "narrativeqa", e=True)


def test_rows_come_from_a_zip_wherever_they_lie_in_it(tokenizer, folder, tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"data/{file.name}")
    assert list(bench(path, "vcsum").examples(tokenizer)) == list(bench(folder, "vcsum").examples(tokenizer))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(SkvError, match=r"holds no <task>.jsonl files"):
        bench(path, "vcsum").questions(tokenizer)
    path.write_text("not a zip")
    with pytest.raises(SkvError, match="is not a zip file"):
        bench(path, "vcsum").questions(tokenizer)
    with pytest.raises(SkvError, match="does not exist"):
        bench(tmp_path / "nowhere", "vcsum").questions(tokenizer)


def test_unusable_rows_are_named_with_file_and_line(tokenizer, folder):
    good = longbench_rows.rows("lcc")[0]
    for bad, says in (
        ("{", "line 2: not JSON"),
        ("3", "line 2: not a JSON object"),
        (json.dumps({k: v for k, v in good.items() if k != "context"}), "line 2: 'context' is missing"),
        (json.dumps({**good, "answers": []}), "line 2: 'answers' is not a list of texts"),
        (json.dumps({**good, "answers": [""]}), "line 2: 'answers' is not a list of texts"),
        (json.dumps({**good, "answers": "x"}), "line 2: 'answers' is not a list of texts"),
        (json.dumps({**good, "length": "long"}), "line 2: 'length' is not a number"),
    ):
        (folder / "lcc.jsonl").write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(SkvError, match=says) as caught:
            bench(folder, "lcc").questions(tokenizer)
        assert "lcc.jsonl" in str(caught.value)
    (folder / "lcc.jsonl").write_text("")
    with pytest.raises(SkvError, match="is empty"):
        bench(folder, "lcc").questions(tokenizer)


def test_rows_that_cannot_be_judged_are_refused(tokenizer, folder):
    """Without any classes or its form, a right answer would score 0, or end the run."""
    for task, change, says in (
        ("trec", {"all_classes": None}, "'all_classes' is missing or empty"),
        ("lsht", {"all_classes": []}, "'all_classes' is missing or empty"),
        ("trec", {"all_classes": "Food"}, "is not a list of texts"),
        ("passage_retrieval_en", {"answers": ["3"]}, "not of the form 'Paragraph 12'"),
        ("lcc", {"context": "\ud800"}, "half a character"),
        ("lcc", {"length": float("inf")}, "'length' is not a number"),
    ):
        row = {**longbench_rows.rows(task)[0], **change}
        (folder / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(SkvError, match=says):
            bench(folder, task).questions(tokenizer)


def test_an_answer_outside_its_classes_is_judged_as_the_authors_do(tokenizer, folder):
    """They give it 0; refusing the row would refuse the whole official file."""
    row = {**longbench_rows.rows("trec")[0], "answers": ["Colour"]}
    (folder / "trec.jsonl").write_text(json.dumps(row) + "\n")
    (example,) = bench(folder, "trec").examples(tokenizer)
    assert bench(folder, "trec").score(example, "Colour") == 0.0


def test_a_damaged_zip_is_named(tokenizer, folder, tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "lcc.jsonl", "lcc.jsonl")
    raw = bytearray(path.read_bytes())
    raw[60] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(SkvError, match=r"is damaged|not JSON"):
        bench(path, "lcc").questions(tokenizer)


def test_tables_say_how_many_rows_and_whether_methods_answered_the_same():
    rows = records({"lcc": 0.5}) + [replace(r, sample="row=9") for r in records({"lcc": 1.0})]
    assert "Rows per task: 2." in longbench_tables(rows)[0].caption
    rows += records({"lcc": 0.5}, method="quest")
    assert "DID NOT ANSWER THE SAME ROWS" in longbench_tables(rows)[0].caption
    failed = [replace(r, score=None, status="oom") for r in records({"lcc": 0.5})]
    assert longbench_tables(failed)[0].rows == [["lcc", "–"]]


def test_offline_the_hub_is_not_waited_for(tokenizer, monkeypatch, tmp_path):
    import time

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(SkvError, match="give it with --data"):
        bench("", "lcc", data=None).questions(tokenizer)
    assert time.perf_counter() - started < 2


def test_all_tasks_run_through_the_command_line(tiny_folder, folder, tmp_path, capsys):
    """Every task of a laptop's run; of those without rows, all but the missing ones."""
    (folder / "vcsum.jsonl").unlink()
    argv = ["eval", "longbench", "--model", str(tiny_folder), "--data", str(folder), "--wording", "own"]
    argv += ["-m", "full", "-m", "quest:budget=64", "--samples", "1", "--max-prompt-tokens", "600"]
    argv += ["--out", str(tmp_path / "run")]
    assert main([*argv, "--dry-run"]) == 0
    capsys.readouterr()
    assert main(argv) == 1
    said = capsys.readouterr()
    assert "skv: left out: vcsum: no rows" in said.err
    assert "LongBench, percent by task" in said.out
    assert "not the official prompt templates" in said.out
    manifest, records = read_run(tmp_path / "run")
    assert len(records) == 20 * 2
    assert all(r.status == "ok" and r.score is not None for r in records)
    assert "left out: vcsum: no rows" in manifest.notes
    assert len(manifest.sources["rows"]["sha256"]) == 64
    assert {p.name for p in (tmp_path / "run" / "plots").iterdir()} >= {"score_by_class.png", "tasks.png"}
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert main(argv) == 1
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before


def test_without_jieba_chinese_tasks_are_left_out_and_the_rest_runs(tokenizer, folder, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jieba" else real(name, *a))
    benchmark = bench(folder)
    assert benchmark.left_out(tokenizer).keys() == {"multifieldqa_zh", "dureader", "vcsum"}
    assert all("pip install 'skv[zh]'" in reason for reason in benchmark.left_out(tokenizer).values())
    assert len(benchmark.questions(tokenizer)) == 2 * 18
    with pytest.raises(SkvError, match=r"vcsum: needs jieba"):
        bench(folder, "vcsum").questions(tokenizer)


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "classes", "score"),
    [
        (metrics.qa_f1, "The Eiffel Tower!", "eiffel tower", (), 1.0),
        (metrics.qa_f1, "in Paris, France", "Paris", (), 0.5),
        (metrics.qa_f1, "a the an", "the", (), 0.0),
        (metrics.qa_f1_zh, "清华大学。", "清华大学", (), 1.0),
        (metrics.qa_f1_zh, "我来到清华大学", "清华大学", (), 0.5),
        (metrics.rouge_l, "a b. c d", "c d. a b", (), 1.0),
        (metrics.rouge_l, "", "x", (), 0.0),
        (metrics.rouge_l, "...", "x", (), 0.0),
        (metrics.rouge_l, "a b c d", "a b x y", (), 0.5),
        (metrics.rouge_l_zh, "清华大学", "清华大学", (), 1.0),
        (metrics.classification, "Food and Event", "Food", ("Food", "Currency", "Event"), 0.5),
        (metrics.classification, "food", "Food", ("Food",), 0.0),
        # A class that is part of the answer is dropped ...
        (metrics.classification, "Number of something", "Number of something", ("Number", "Number of something"), 1.0),
        # ... but of two in a row only the first, because the list is walked through while it shrinks.
        (metrics.classification, "abc", "abc", ("a", "b", "abc"), 0.5),
        (metrics.retrieval, "Paragraph 12, not 13", "Paragraph 12", (), 0.5),
        (metrics.retrieval, "none", "Paragraph 12", (), 0.0),
        (metrics.retrieval_zh, "是段落7", "段落7", (), 1.0),
        (metrics.count, "There are 5 or 5.", "5", (), 1.0),
        (metrics.code_similarity, "\n# comment\n```\nreturn x", "return x", (), 1.0),
        (metrics.code_similarity, "// nothing", "return x", (), 0.0),
        (metrics.code_similarity, "    return x", "return x", (), 0.8),
        (metrics.code_similarity, "  \nreturn x", "return x", (), 0.2),
    ],
)
def test_metric_cases(metric, prediction, answer, classes, score):
    assert metric(prediction, answer, classes) == pytest.approx(score, abs=1e-7)


WORDS = [
    *(
        "the",
        "An",
        "cat",
        "Cat",
        "sat",
        "on",
        "mat",
        ".",
        ",",
        "a",
        "12",
        "3",
        "Paragraph",
        "段落",
        "清华",
        "大学",
        "。",
    ),
    *(
        "我来到",
        "北京",
        "\n",
        "\n\n",
        " ",
        "#",
        "`",
        "//",
        "return",
        "x",
        "=",
        "(",
        "é",
        "\u2028",
        "\x00",
        "\U0001f600",
    ),
    *("²", "٣", "Number", "of", "!", "-", "_", ""),
]


def nonsense(rng, most):
    glue = rng.choice(["", " ", " ", " "])
    return glue.join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))


@needs_pack
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("qa_f1", "qa_f1_score"),
        ("qa_f1_zh", "qa_f1_zh_score"),
        ("rouge_l", "rouge_score"),
        ("rouge_l_zh", "rouge_zh_score"),
        ("classification", "classification_score"),
        ("retrieval", "retrieval_score"),
        ("retrieval_zh", "retrieval_zh_score"),
        ("count", "count_score"),
        ("code_similarity", "code_sim_score"),
    ],
)
def test_metrics_agree_with_the_official_ones_on_ten_thousand_cases(ours, theirs):
    """The package's copies differ from the authors' in one place, which is named below."""
    pytest.importorskip("fuzzywuzzy")
    pytest.importorskip("jieba")
    official: dict = {}
    exec((pack_path("longbench") / "official_metrics.py").read_text(), official)
    rng = seeded("differential fuzz", ours)
    positive = 0
    for _ in range(10_000):
        answer = nonsense(rng, 6)
        prediction = nonsense(rng, 12) + rng.choice(["", answer, answer[:3]])
        classes = [nonsense(rng, 2) or "x" for _ in range(4)]
        if ours in ("retrieval", "retrieval_zh"):
            answer = ("Paragraph " if ours == "retrieval" else "段落") + rng.choice(["3", "12"])
        if ours == "count":
            answer = str(rng.choice([3, 12, 123]))
        if ours == "classification":
            answer = rng.choice([*classes, answer])
        if ours == "code_similarity":
            # The package skips blank lines, the authors only leading line breaks: no blank line, no difference.
            prediction = "\n".join(line for line in prediction.split("\n") if line.strip())
        expected = official[theirs](prediction, answer, all_classes=classes)
        got = getattr(metrics, ours)(prediction, answer, classes)
        assert got == pytest.approx(expected, abs=1e-12), (prediction, answer, classes)
        positive += expected > 0
    assert 500 < positive < 9900, "cases must be of both kinds"


def records(scores, **changes):
    return [
        replace(RECORD, benchmark="longbench", task=task, score=score, meta={"bucket": "0-4k"}, **changes)
        for task, score in scores.items()
    ]


def test_averages_are_those_of_the_papers():
    """ChatGLM3-6B-32k's category means as published give its published averages."""
    published = dict(zip(("single", "multi", "summ", "few", "synth", "code"), (40.3, 46.6, 29.5, 68.1, 50.5, 56.2),
                         strict=True))  # fmt: skip
    english = [s for s in TASKS.values() if s.language != "zh"]
    table = longbench_tables(records({s.name: published[_short(s.category)] / 100 for s in english}))[0]
    found = {row[0]: row[1] for row in table.rows}
    assert found["English average (6 categories)"] == "48.53"
    assert "Chinese average (6 categories)" not in found
    sixteen = sum(published[_short(s.category)] for s in english) / 16
    assert found["mean of the 16 English and code tasks"] == f"{sixteen:.2f}"
    partial = longbench_tables(records({"lcc": 0.5, "qasper": 0.25}))[0]
    assert [row[0] for row in partial.rows] == ["qasper", "lcc"], "no mean over tasks that were not run"


def _short(category):
    return {"single-doc QA": "single", "multi-doc QA": "multi", "summarization": "summ", "few-shot": "few",
            "synthetic": "synth", "code": "code"}[category]  # fmt: skip


def test_e_is_shown_by_length_class():
    rows = [
        replace(row, task="lcc_e", sample=f"row={i}", meta={"bucket": bucket})
        for i, (row, bucket) in enumerate(zip(records({"a": 0.1, "b": 0.3, "c": 0.5}), ("0-4k", "0-4k", "8k+"),
                                              strict=True))
    ]  # fmt: skip
    assert longbench_tables(rows)[1].rows == [["full", "lcc", "20.00", "–", "50.00"]]


V2 = {
    "_id": "1", "domain": "law", "sub_domain": "x", "difficulty": "easy", "length": "short", "question": "Which? $C_A$",
    "choice_A": "red", "choice_B": "green", "choice_C": "blue", "choice_D": "none", "answer": "B",
    "context": " Some text. " * 50,
}  # fmt: skip


def test_v2_reads_its_questions_and_judges_the_letter(tokenizer, tmp_path, tiny_folder, capsys):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([V2, {**V2, "difficulty": "hard", "answer": "A"}]))
    benchmark = LongBenchV2(max_prompt_tokens=3500, data=str(tmp_path))
    example = next(benchmark.examples(tokenizer))
    text = tokenizer.decode(example.input_ids)
    assert "Which? $C_A$" in text, "what looks like a placeholder inside a text stays"
    assert "(B) green" in text
    assert benchmark.score(example, "The correct answer is (B).") == 1.0
    assert benchmark.score(example, "**The correct answer is B**") == 1.0
    assert benchmark.score(example, "B") == 0.0
    assert named_choice("maybe (C)") is None
    argv = ["eval", "longbench", "--v2", "--model", str(tiny_folder), "--data", str(path), "-m", "full"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert "not the official prompt template" in capsys.readouterr().out
    assert len(read_run(tmp_path / "run")[1]) == 2
    for bad, says in (([], "not a list"), ([{**V2, "answer": "E"}], "not one of A, B, C, D"), ([{}], "is missing")):
        path.write_text(json.dumps(bad))
        with pytest.raises(SkvError, match=says):
            LongBenchV2(max_prompt_tokens=3500, data=str(path)).questions(tokenizer)
    with pytest.raises(SkvError, match="comes in no package"):
        LongBenchV2(max_prompt_tokens=3500, data=str(path), wording="official").questions(tokenizer)


def test_v2_accuracy_is_split_as_its_authors_do():
    rows = [
        replace(RECORD, sample=f"{i}", score=score, prediction=said, meta={"difficulty": d, "length": n})
        for i, (score, d, n, said) in enumerate(
            [(1.0, "easy", "short", "The correct answer is (A)"), (0.0, "hard", "long", "dunno")]
        )
    ]
    assert v2_tables(rows)[0].rows == [["full", "50.0", "100.0", "0.0", "100.0", "–", "0.0", "1"]]
