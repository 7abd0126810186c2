"""RULER: thirteen tasks that fill their length, have one right answer, and are the same for the same seed."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from evals.common.names import choose_tasks
from evals.common.seeding import seeded
from evals.ruler import metrics
from evals.ruler.families.fitting import Draft, fit
from evals.ruler.files import RulerFiles, write_files
from evals.ruler.materials import Essay, PulledMaterials, sha16
from evals.ruler.report import ruler_tables
from evals.ruler.task import Ruler
from evals.ruler.tasks import PROFILES, TASKS
from shadowkv.common.errors import SkvError
from shadowkv.models.loading import load_tokenizer
from shadowkv.models.packs import pack_path
from shadowkv.models.resolving import resolve

needs_pack = pytest.mark.skipif(pack_path("ruler") is None, reason="ruler is not pulled")
WORDINGS = ["own", pytest.param("official", marks=needs_pack)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The small real model's tokenizer, or else one that makes a token of every word of up to four letters."""
    if pack_path("smollm2-135m") is not None:
        return load_tokenizer(resolve("smollm2-135m"))
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s?\S{1,4}"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def run(task, wording="own", **changes):
    return Ruler(**{"lengths": (4096,), "tasks": (task,), "samples": 3, "wording": wording, **changes})


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [2048, 4096, 16384])
def test_prompts_fill_their_length_and_never_exceed_it(tokenizer, task, wording, length):
    for example in run(task, wording, lengths=(length,), samples=8 if length == 4096 else 2).examples(tokenizer):
        used = len(example.input_ids) + example.max_new_tokens
        assert 0.9 * length <= used <= length


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("task", TASKS)
def test_references_score_one_and_silence_scores_nothing(tokenizer, task, wording):
    # ShadowKV leaves cwe out, and its metric could not find "self-confidence", which splits at the hyphen.
    for profile in (name for name, found in PROFILES.items() if task in found.tasks):
        benchmark = run(task, wording, profile=profile)
        for example in benchmark.examples(tokenizer):
            assert benchmark.score(example, " and ".join(example.references)) == 1.0
            assert benchmark.score(example, "") == 0.0
            assert benchmark.score(example, " \n\x00") == 0.0


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("task", TASKS)
def test_any_subset_reproduces(tokenizer, task, wording):
    many = {e.question: e for e in run(task, wording, samples=6, lengths=(2048, 4096)).examples(tokenizer)}
    assert len({e.input_ids for e in many.values()}) == len(many) == 12
    few = run(task, wording, samples=4)
    assert all(many[e.question] == e for e in few.examples(tokenizer))
    last = few.questions(tokenizer)[-1]
    assert next(few.examples(tokenizer, [last])) == many[last]
    other = next(run(task, wording, seed=1, samples=1).examples(tokenizer))
    assert other.input_ids != next(few.examples(tokenizer)).input_ids


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("niah")])
def test_needles_are_there_once_and_asked_for(tokenizer, task, wording):
    family, benchmark = TASKS[task], run(task, wording)
    form = benchmark.materials.sentence("needle").replace("{type_needle_v}", family.value_kind)
    pattern = re.compile(re.escape(form).replace(r"\{key\}", "([^ ]+)").replace(r"\{value\}", "([^ ]+)"))
    for example, text in benchmark.prompts(tokenizer):
        found = pattern.findall(text)
        keys = Counter(key for key, _ in found)
        answers = {key for key, value in found if value in example.references}
        assert all(text.count(value) == 1 for value in example.references)
        assert all(keys[key] == family.values for key in answers)
        assert len(answers) == family.queries
        assert all(key in text[text.rindex(found[-1][1]) :] for key in answers)
        needles = max(family.keys, family.queries) * family.values
        assert len(found) == needles or (family.haystack == "needle" and len(found) > needles)
        assert len(example.references) == family.queries * family.values


def test_variables_are_tracked_in_order(tokenizer):
    for example, text in run("vt").prompts(tokenizer):
        asked = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)
        assert tuple(name for name, _ in asked) == example.references
        assert all(value == before for (before, _), (_, value) in pairwise(asked))
        assert asked[0][1].isdecimal()
        assert text.count(asked[0][1]) == 2, "in its assignment and in the question"
        solved = re.findall(r"VAR ([A-Z]{3}) = ", text)
        assert len(solved) == 5, "one worked example, with shorter names"


def test_common_words_occur_most_often(tokenizer):
    for length, repeats in ((4096, (30, 3)), (2048, (6, 1))):
        for example, text in run("cwe", lengths=(length,)).prompts(tokenizer):
            listed = text[text.rindex("1. ") :] if text.count(" 1. ") == 0 else text[text.rindex("\n1. ") :]
            counts = Counter(re.findall(r"\d+\. (\w+)", listed))
            common = {word for word, count in counts.items() if count == repeats[0]}
            assert common == set(example.references)
            assert {count for word, count in counts.items() if word not in common} == {repeats[1]}


def test_frequent_words_follow_the_zeta_distribution(tokenizer):
    for example, text in run("fwe").prompts(tokenizer):
        counts = Counter(re.findall(r"\b[a-z]{6}\b(?= )", text.split("words. ", 1)[1].split("\n")[0]))
        top = [word for word, _ in counts.most_common(4)]
        assert tuple(top[:3]) == example.references
        assert counts[top[2]] > counts[top[3]]
        assert text.count("...") > counts[top[0]]
        assert counts[top[0]] / counts[top[1]] == pytest.approx(9 / 4, rel=0.1)


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_the_documents_of_a_question_are_in_its_prompt(tokenizer, task, wording):
    benchmark = run(task, wording)
    corpus = benchmark.materials.corpus(TASKS[task].dataset)
    for example, text in benchmark.prompts(tokenizer):
        question = corpus.questions[example.meta["question"]]
        assert all(text.count(corpus.documents[i]) == 1 for i in question.documents)
        assert question.query in text
        assert example.references == question.answers
        numbered = [int(n) for n in re.findall(r"^(?:Document|Text) (\d+):$", text, flags=re.M)]
        assert numbered == list(range(1, len(numbered) + 1))


def test_corpora_are_read_once_a_run(tokenizer, monkeypatch):
    """HotpotQA takes a second and 60 MB."""
    from evals.ruler.own_materials import OwnMaterials

    read, corpus = [], OwnMaterials._own_corpus
    monkeypatch.setattr(OwnMaterials, "_own_corpus", lambda self, name: read.append(name) or corpus(self, name))
    benchmark = Ruler(lengths=(2048, 4096), tasks=("qa_1", "qa_2"), samples=1, wording="own")
    assert len(list(benchmark.examples(tokenizer, benchmark.questions(tokenizer)))) == 4
    assert sorted(read) == ["hotpotqa", "squad"]


# sha256[:16] of NVIDIA's templates and answer prefixes, at commit c3f5e3b of its repository.
OFFICIAL_SHA256 = {
    "niah": ("b373c00e238df12b", "994f3a46e763414f"),
    "variable_tracking": ("fcfaf2eab2bc3e35", "4a4e9010ec4141a3"),
    "common_words_extraction": ("45fff5d17627b65a", "8ee526599bbc7372"),
    "freq_words_extraction": ("a0c7b873cf500d6c", "9a72271c5762c96d"),
    "qa": ("18a659c9723f24f1", "255204f061d7e266"),
}


@needs_pack
def test_templates_are_the_official_ones():
    pulled = PulledMaterials()
    assert {name: tuple(map(sha16, pulled.template(name))) for name in OFFICIAL_SHA256} == OFFICIAL_SHA256


@needs_pack
def test_a_prompt_reads_as_the_original(tokenizer):
    """The question in the singular for one value, the answer begun after the assistant's header."""
    example, text = next(run("niah_single_1", "official").prompts(tokenizer))
    prefix = example.meta["answer_prefix"]
    assert "A special magic number is hidden" in text
    assert re.search(r"What is the special magic number for [a-z]+-[a-z' -]+ mentioned", text)
    assert prefix.startswith(" The special magic number for ")
    assert prefix.endswith("mentioned in the provided text is")
    example, text = next(run("niah_multiquery", "official").prompts(tokenizer))
    assert "Some special magic numbers are hidden" in text
    assert example.meta["answer_prefix"].endswith("mentioned in the provided text are")
    assert tokenizer.decode(example.input_ids).endswith(example.meta["answer_prefix"])


def test_word_pairs_need_no_list_of_all_pairs(tokenizer):
    """Drawn apart, both parts are uniform and independent."""
    benchmark = run("niah_single_1")
    keys = [re.search(r"(\w+)-(\w+)", e.meta["answer_prefix"]).groups() for e in
            run("niah_single_1", samples=200, lengths=(1024,)).examples(tokenizer)]  # fmt: skip
    assert len(set(keys)) == 200
    assert {a for a, _ in keys} <= set(benchmark.materials.words("adjective"))
    assert len({a for a, _ in keys}) > 100


def test_essays_repeat_and_are_cut_by_words():
    essay = Essay("One two. Three four five! Six?")
    assert essay.sentences(3) == ["One two.", "Three"]
    assert essay.sentences(6) == ["One two.", "Three four five!", "Six?"]
    assert essay.sentences(8) == ["One two.", "Three four five!", "Six?", "One two."]


@pytest.mark.parametrize("per_unit", [0.3, 1.0, 7.0, 40.0])
@pytest.mark.parametrize("guess", [0.25, 1.0, 30.0])
def test_fitting_finds_the_largest_size(per_unit, guess):
    def ids_of(message):
        return [0] * int(100 + per_unit * len(message))

    for largest in (None, 300):
        draft = Draft(lambda size: "x" * size, "", (), smallest=5, unit_tokens=guess, largest=largest)
        best = fit(draft, ids_of, 4000)
        step = max(1, int(10 / guess))
        size = len(best.message)
        assert len(best.input_ids) <= 4000
        assert (size - 5) % step == 0
        assert len(ids_of("x" * (size + step))) > 4000 or (largest is not None and size + step > largest)
    assert fit(draft, ids_of, 100) is None


def test_files_hold_the_same_prompts(tokenizer, tmp_path):
    made = Ruler(lengths=(2048,), tasks=("niah_multikey_2", "vt", "qa_1"), samples=3, wording="own")
    paths = write_files(made, tokenizer, tmp_path / "prompts")
    assert str(paths[0].relative_to(tmp_path)) == "prompts/2048/niah_multikey_2/validation.jsonl"
    row = json.loads(paths[0].read_text().splitlines()[0])
    fields = "index input outputs length length_w_model_temp answer_prefix question templated"
    assert row.keys() == set(fields.split())
    read = RulerFiles(tmp_path / "prompts", (), tuple(TASKS))
    for ours, theirs in zip(made.examples(tokenizer), read.examples(tokenizer), strict=True):
        assert ours.input_ids == theirs.input_ids
        assert ours.references == theirs.references
        assert (ours.task, ours.length_tokens, ours.max_new_tokens) == (
            theirs.task, theirs.length_tokens, theirs.max_new_tokens,
        )  # fmt: skip
    assert "only with runs on the same files" in read.notes()[0]
    assert len(read.questions(tokenizer)) == 9


def test_prompts_from_files_are_the_same_whatever_the_tokenizer_adds(tmp_path):
    """With a beginning that no attribute names (GLM), and with a template that does not spell it (Zephyr)."""
    from tokenizers import processors

    from shadowkv.models.loading import load_tokenizer
    from shadowkv.models.presets import find_preset
    from shadowkv.models.resolving import ModelSource

    for template in (None, "<u>{{ messages[0]['content'] }}</u><a>", "!!{{ messages[0]['content'] }}<a>"):
        made = load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))
        single = "! ! $A"
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("!", made.convert_tokens_to_ids("!"))]
        )
        made.chat_template = template
        folder = tmp_path / str(hash(template))
        run_ = Ruler(lengths=(2048,), tasks=("fwe",), samples=1, wording="own")
        write_files(run_, made, folder)
        direct, read = next(run_.examples(made)), next(RulerFiles(folder, (), tuple(TASKS)).examples(made))
        assert read.input_ids == direct.input_ids


def test_files_beyond_the_context_or_not_there_are_said(tokenizer, tmp_path):
    write_files(Ruler(lengths=(2048,), tasks=("vt",), samples=2, wording="own"), tokenizer, tmp_path)
    with pytest.raises(SkvError, match="beyond this model's context of 1024"):
        RulerFiles(tmp_path, (), tuple(TASKS), context_tokens=1024).questions(tokenizer)
    part = RulerFiles(tmp_path, (2048, 4096), ("vt", "qa_1"), all_tasks=False)
    assert part.left_out(tokenizer) == {"qa_1 at 2048": "no file", "vt at 4096": "no file", "qa_1 at 4096": "no file"}
    one, two = (RulerFiles(tmp_path, (), tuple(TASKS), samples=n).sources() for n in (1, 2))
    assert one == two, "a run can grow"


def test_prompts_do_not_change_from_day_to_day(tokenizer):
    from evals.common.chat import Chat

    class Dated:
        chat_template = "any"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt, strftime_now, **_):
            return f"{strftime_now('%d %b %Y')}|{messages[0]['content']}|"

    assert Chat(Dated()).text("x") == "26 Jul 2024|x|"

    class Twice(Dated):
        def apply_chat_template(self, messages, **_):
            return messages[0]["content"] * 2

    with pytest.raises(SkvError, match="drops, repeats or changes"):
        Chat(Twice())


def test_broken_files_are_named_with_their_line(tokenizer, tmp_path):
    path = tmp_path / "1024" / "vt" / "validation.jsonl"
    path.parent.mkdir(parents=True)
    good = {"index": 0, "input": "x", "outputs": ["A"], "answer_prefix": ""}
    for bad, says in (
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        (json.dumps({**good, "input": None}), "line 2: 'input' is missing"),
        (json.dumps({**good, "outputs": []}), "line 2: 'outputs' is not a list of answers"),
        (json.dumps({**good, "outputs": [""]}), "line 2: 'outputs' is not a list of answers"),
    ):
        path.write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(SkvError, match=says):
            RulerFiles(tmp_path, (), tuple(TASKS)).questions(tokenizer)
    with pytest.raises(SkvError, match="holds no <length>/<task>"):
        RulerFiles(tmp_path, (2048,), tuple(TASKS)).questions(tokenizer)
    with pytest.raises(SkvError, match="is not a folder"):
        RulerFiles(tmp_path / "nowhere", (), tuple(TASKS)).questions(tokenizer)


@pytest.mark.parametrize("task", TASKS)
def test_an_unfittable_length_is_an_error_and_no_loop(tokenizer, task):
    with pytest.raises(SkvError, match=r"too short for|holds 0 questions of qa_\d; use a longer one"):
        list(run(task, lengths=(160,), samples=1).examples(tokenizer))


@pytest.fixture
def few_words(monkeypatch):
    """Word lists that common words run out of at 16K, as the real ones do at 256K."""
    from evals.ruler.own_materials import OwnMaterials

    monkeypatch.setattr(OwnMaterials, "words", lambda self, kind: [f"{kind}{i}" for i in range(60)])


def test_a_length_beyond_the_word_list_is_left_out_with_its_reason(tokenizer, few_words):
    benchmark = run("cwe", tasks=("niah_single_1", "cwe", "fwe"), lengths=(2048, 16384), samples=2)
    questions = benchmark.questions(tokenizer)
    assert benchmark.left_out(tokenizer) == {"cwe at 16384": "its 180 words do not fill that length"}
    assert {(q.task, q.length_tokens) for q in questions} == {
        ("niah_single_1", 2048), ("cwe", 2048), ("fwe", 2048), ("niah_single_1", 16384), ("fwe", 16384),
    }  # fmt: skip
    assert [example.question for example in benchmark.examples(tokenizer)] == list(questions)
    assert run("cwe", lengths=(2048,)).left_out(tokenizer) == {}


def test_a_length_beyond_the_word_list_is_an_error_where_nothing_else_is_asked_for(tokenizer, few_words):
    with pytest.raises(SkvError, match="none of the tasks can be run; cwe at 16384: its 180 words do not fill"):
        run("cwe", lengths=(16384,)).questions(tokenizer)


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "score"),
    [
        (metrics.string_match_all, "It is 1234567.", ["1234567"], 1.0),
        (metrics.string_match_all, "12345678", ["1234567"], 1.0),  # contained, as in the original
        (metrics.string_match_all, "ABC def", ["abc", "DEF", "ghi", "jkl"], 0.5),
        (metrics.string_match_all, "a\x01b", ["a\nb"], 1.0),
        (metrics.string_match_all, "", ["x"], 0.0),
        (metrics.string_match_part, "the answer is denver", ["Denver", "Denver Broncos", "Broncos"], 1.0),
        (metrics.string_match_part, "boston", ["Denver", "Denver Broncos"], 0.0),
        (metrics.shadowkv_needle, " 1234567 is the number", ["1234567"], 1.0),
        (metrics.shadowkv_needle, "12345678", ["1234567"], 1.0),  # starts with it, as in the original
        (metrics.shadowkv_needle, "number: 1234567<|eot_id|>", ["1234567"], 1.0),
        (metrics.shadowkv_needle, "x1234567", ["1234567"], 0.0),
        (metrics.shadowkv_numbers, "111, 222 and 3334", ["111", "222", "333", "444"], 0.5),
        (metrics.shadowkv_words, "ABCDE, fghij.", ["abcde", "FGHIJ", "klmno", "pqrst"], 0.5),
        (metrics.shadowkv_part, "Denv", ["Denver"], 1.0),  # part of a reference, as in the original
        (metrics.shadowkv_part, "", ["Denver"], 0.0),  # 1 in the original
        (metrics.shadowkv_part, "Boston", ["Denver"], 0.0),
    ],
)
def test_metric_cases(metric, prediction, references, score):
    assert metric(prediction, references) == score


PIECES = [
    *("1234567", "12345678", "abc", "ABC", "the", "An", "é", "ſ", "ß", "İ", "中文", "。", "\n", "\x00", "\x1f", " "),
    *("\u2028", "\U0001f600", "</s>", "'", "_", "0", "٣", "²", "-", "a-b", "def f(x):", "# no", ""),
]


def nonsense(rng, most=8):
    """Adversarial text: pieces of everything, glued with or without spaces."""
    return rng.choice(["", " ", "\n"]).join(rng.choice(PIECES) for _ in range(rng.randint(0, most)))


@needs_pack
def test_metrics_agree_with_the_official_ones_on_ten_thousand_cases():
    official: dict = {}
    exec((pack_path("ruler") / "official_metrics.py").read_text(), official)
    # The original cleans predictions in another file, which needs its whole framework: as A.2 of its description says.
    control = re.compile(r"[\x00-\x1f]")
    for name in ("string_match_all", "string_match_part"):
        ours, theirs = getattr(metrics, name), official[f"{name}_per_sample"]
        rng = seeded("differential fuzz", name)
        hits = 0
        for _ in range(10_000):
            references = [nonsense(rng, 2) or "x" for _ in range(rng.randint(1, 4))]
            prediction = nonsense(rng) + rng.choice([*references, ""])
            cleaned = control.sub("\n", prediction.strip()).strip()
            expected = theirs([cleaned], [references])[0] / 100
            assert ours(prediction, references) == pytest.approx(expected, abs=1e-12), (prediction, references)
            hits += expected > 0
        assert 1000 < hits < 9900, "cases must be of both kinds"


def test_tasks_are_chosen_in_the_benchmarks_order():
    assert choose_tasks("qa_1, vt", TASKS, ()) == ("vt", "qa_1")
    assert choose_tasks("all", TASKS, PROFILES["shadowkv"].tasks) == PROFILES["shadowkv"].tasks
    assert len(PROFILES["shadowkv"].tasks) == 11
    with pytest.raises(SkvError, match="did you mean 'niah_single_1'"):
        choose_tasks("niah_singel_1", TASKS, ())
    with pytest.raises(SkvError, match="no tasks given"):
        choose_tasks(",", TASKS, ())


def test_the_effective_length_is_the_longest_that_exceeds_the_threshold():
    from test_results import RECORD, replace

    def records(method, length, score):
        return [replace(RECORD, benchmark="ruler", method=method, length=length, task=t, score=score) for t in TASKS]

    rows = [*records("full", 4096, 0.9), *records("full", 8192, 0.86), *records("full", 16384, 0.856)]
    rows += records("quest", 4096, 0.8)
    matrix, effective = ruler_tables(rows)
    assert effective.rows == [["full", "8k"], ["quest", "below 4k"]]
    assert matrix.rows[2][-1] == "85.6"
    nothing = [replace(row, score=None, status="oom") for row in rows[:26]]
    assert ruler_tables(nothing)[1].rows == [["full", "–"]], "what was not measured is not known to be bad"
    failed = [replace(rows[0], score=None, status="error"), *rows[1:13]]
    assert ruler_tables(failed)[0].rows[0][-1] == "–", "an average over fewer tasks is not the benchmark's"
