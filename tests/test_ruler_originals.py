"""Our generators beside the original ones, which the pulled package brings: same texts, needles, depths and sizes.

The originals are scripts that parse arguments and import a framework; they are run here with stand-ins for all of
that, on a word list cut short (they list all six million pairs).
"""

from __future__ import annotations

import re
import sys
import types

import pytest

from evals.ruler.materials import PulledMaterials
from evals.ruler.task import Ruler
from evals.ruler.tasks import TASKS
from shadowkv.models.loading import load_tokenizer
from shadowkv.models.packs import pack_path
from shadowkv.models.resolving import resolve

pytestmark = pytest.mark.skipif(
    pack_path("ruler") is None or pack_path("smollm2-135m") is None, reason="ruler or smollm2-135m is not pulled"
)

LENGTH = 4096
SCRIPTS = {
    "niah": "niah.py", "variable_tracking": "variable_tracking.py", "common_words_extraction":
    "common_words_extraction.py", "freq_words_extraction": "freq_words_extraction.py", "qa": "qa.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """Without a chat template, as the originals measure."""
    made = load_tokenizer(resolve("smollm2-135m"))
    made.chat_template = None
    return made


@pytest.fixture
def original(tokenizer, tmp_path, monkeypatch):
    """Runs an original script for a task and returns that many rows."""
    folder = pack_path("ruler")
    (tmp_path / "json").mkdir()
    for name in ("PaulGrahamEssays", "squad", "hotpotqa"):
        (tmp_path / "json" / f"{name}.json").symlink_to(folder / f"{name}.json")

    def module(name, **contents):
        made = types.ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    rows: list[dict] = []
    constants = module("constants")
    exec((folder / "constants.py").read_text(), vars(constants))
    ours = types.SimpleNamespace(text_to_tokens=tokenizer.tokenize)
    for name in ("tokenizer", "long_context_eval.data.tokenizer"):
        module(name, select_tokenizer=lambda *_: ours)
    module("long_context_eval", pred=module("long_context_eval.pred"), data=module("long_context_eval.data"))
    module("long_context_eval.pred.nemo_utils", write_manifest=lambda path, made: rows.extend(made))
    words = module("wonderwords.random_word", _get_words_from_text_file=lambda name: _words(folder / name))
    module("wonderwords", random_word=words)
    module("nltk", tokenize=module("nltk.tokenize", sent_tokenize=lambda text: re.split(r"(?<=[.!?]) ", text)))
    module("tqdm", tqdm=lambda items: items)
    special = module("scipy.special", zeta=lambda exponent: sum(k**-exponent for k in range(1, 200_000)))
    module("scipy", special=special)

    def generate(task, samples):
        family = TASKS[task]
        template = constants.TASKS[family.template_name]
        arguments = {
            "save_dir": tmp_path, "save_name": task, "tokenizer_path": "-", "max_seq_length": LENGTH,
            "tokens_to_generate": template["tokens_to_generate"], "num_samples": samples,
            "template": template["template"] + template["answer_prefix"], **_arguments(family),
        }  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["x", *(f"--{key}={value}" for key, value in arguments.items())])
        source = (folder / SCRIPTS[family.template_name]).read_text()
        scope = {"__name__": "__main__", "__file__": str(tmp_path / "script.py")}
        exec(compile(source, "original", "exec"), scope)
        return rows

    return generate


def _words(path):
    lines = path.read_text().splitlines()
    return lines if "niah" not in sys.argv[2] else lines[:200]


def _arguments(family):
    if family.template_name == "niah":
        return {
            "type_haystack": {"noise": "repeat"}.get(family.haystack, family.haystack),
            "type_needle_k": family.key_kind,
            "type_needle_v": family.value_kind,
            "num_needle_k": family.keys,
            "num_needle_v": family.values,
            "num_needle_q": family.queries,
        }
    return {"dataset": family.dataset} if family.template_name == "qa" else {}


def depths(text, needles):
    """Where needles stand, as shares of the text."""
    return sorted(text.index(needle) / len(text) for needle in needles)


def frame(text):
    """What is said around the haystack, with the keys asked for masked."""
    return text.split("\n", 1)[0], re.sub(r"for .*? mentioned", "for * mentioned", text[text.rindex("\nWhat") :])


@pytest.mark.parametrize("task", [t for t in TASKS if t.startswith("niah")])
def test_needles_as_in_the_original(original, tokenizer, task):
    samples = 40
    theirs = [(row["input"], row["outputs"]) for row in original(task, samples)]
    benchmark = Ruler(lengths=(LENGTH,), tasks=(task,), samples=samples)
    ours = [
        (text + example.meta["answer_prefix"], list(example.references))
        for example, text in benchmark.prompts(tokenizer)
    ]
    sizes = [[len(tokenizer.tokenize(text)) + 128 for text, _ in side] for side in (ours, theirs)]
    assert max(map(max, sizes)) <= LENGTH
    assert min(sizes[0]) >= 0.9 * LENGTH
    # Theirs grows in steps of 500 words or 25 lines (which are half of a 4K prompt where they hold UUIDs), ours in
    # steps of a quarter of a percent.
    assert 0 <= (sum(sizes[0]) - sum(sizes[1])) / samples <= (0.5 if task == "niah_multikey_3" else 0.2) * LENGTH
    sentence = PulledMaterials().sentence("needle").split("{")[0]
    places = []
    for side in (ours, theirs):
        counts = {text.count(sentence) for text, _ in side}
        needles = {len(answers) for _, answers in side}
        places.append((counts, needles, [d for text, answers in side for d in depths(text, answers)]))
    if TASKS[task].haystack != "needle":
        assert places[0][0] == places[1][0], "as many needles"
    assert places[0][1] == places[1][1], "as many answers"
    assert _distance(places[0][2], places[1][2]) < 1.63 * (2 / samples) ** 0.5, "Kolmogorov-Smirnov, 1 %"
    assert frame(ours[0][0]) == frame(theirs[0][0])
    assert all(len(set(answers)) == len(answers) for _, answers in ours)


@pytest.mark.parametrize("task", ["vt", "cwe", "fwe", "qa_1", "qa_2"])
def test_other_tasks_as_in_the_original(original, tokenizer, task):
    samples = 40 if task == "vt" else 8
    theirs = [(row["input"], row["outputs"]) for row in original(task, samples)]
    benchmark = Ruler(lengths=(LENGTH,), tasks=(task,), samples=samples)
    ours = [(text + e.meta["answer_prefix"], list(e.references)) for e, text in benchmark.prompts(tokenizer)]
    generated = TASKS[task].max_new_tokens
    sizes = [[len(tokenizer.tokenize(text)) + generated for text, _ in side] for side in (ours, theirs)]
    assert max(sizes[0]) <= LENGTH
    assert min(sizes[0]) >= 0.9 * LENGTH
    # The original of fwe forgets the generated tokens and so may exceed the length by them.
    assert max(sizes[1]) <= LENGTH + (generated if task == "fwe" else 0)
    # Steps of 10 documents leave the originals of the two QA tasks far below their length.
    assert -0.05 <= (sum(sizes[0]) - sum(sizes[1])) / samples / LENGTH <= (0.6 if task.startswith("qa") else 0.2)
    assert {len(answers) for _, answers in ours} == {len(answers) for _, answers in theirs} or task == "qa_1"
    if task.startswith("qa"):
        assert [answers for _, answers in ours] == [answers for _, answers in theirs], "the same questions in order"
        questions = [[text.rsplit("Question: ", 1)[1] for text, _ in side] for side in (ours, theirs)]
        assert questions[0] == questions[1]
    if task == "vt":
        chains = [[d for text, names in side for d in depths(text, [f"VAR {n} =" for n in names])]
                  for side in (ours, theirs)]  # fmt: skip
        assert _distance(*chains) < 1.63 * (2 / samples) ** 0.5
    if task == "cwe":
        listed = [sorted(_repeats(text).values()) for text, _ in (ours[0], theirs[0])]
        assert set(listed[0]) == set(listed[1]) == {3, 30}
        assert abs(listed[0].count(30) - listed[1].count(30)) == 0
    if task == "fwe":
        shares = [_shares(text, answers) for text, answers in (ours[0], theirs[0])]
        assert shares[0] == pytest.approx(shares[1], rel=0.1)


def _repeats(text):
    """How often each word of the last list occurs."""
    last = text[text.rindex("\n1. ") :]
    words = re.findall(r"\d+\. (\S+)", last)
    return {word: words.count(word) for word in words}


def _shares(text, answers):
    """Share of all words that each answer has."""
    words = text.split()
    return [words.count(answer) / len(words) for answer in answers]


def _distance(left, right):
    """Kolmogorov and Smirnov's: the largest difference between two empirical distributions."""
    points = sorted({*left, *right})
    return max(abs(sum(x <= p for x in left) / len(left) - sum(x <= p for x in right) / len(right)) for p in points)
