"""Needle prompts: exact lengths, right places, reproducible subsets."""

from __future__ import annotations

import pytest

from evals.common.lengths import parse_lengths
from evals.common.metrics import contains_number, contains_text
from evals.common.sources import haystack
from evals.niah.protocols import PROTOCOLS
from evals.niah.task import Niah, parse_depths
from shadowkv.common.errors import SkvError
from shadowkv.models.loading import load_tokenizer
from shadowkv.models.packs import pack_path
from shadowkv.models.presets import find_preset
from shadowkv.models.resolving import ModelSource, resolve

BYTES = ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy")
TOKENIZERS = ["bytes", "smollm2-135m", "gemma3-270m"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    if request.param == "bytes":
        return load_tokenizer(BYTES)
    if pack_path(request.param) is None:
        pytest.skip(f"{request.param} is not pulled")
    return load_tokenizer(resolve(request.param))


def grid(**changes):
    settings = {"lengths": (1024, 2048), "depths": (0.0, 25.0, 50.0, 100.0), "haystack_spec": "synthetic"}
    return Niah(**{**settings, **changes})


def test_prompts_use_their_length_and_never_exceed_it(tokenizer):
    for example in grid(rounds=2).examples(tokenizer):
        tokens = len(example.input_ids)
        assert 0.98 * example.length_tokens <= tokens <= example.length_tokens


def test_the_needle_is_there_once_at_its_depth(tokenizer):
    for example in grid().examples(tokenizer):
        text = tokenizer.decode(example.input_ids)
        number = example.references[0]
        assert text.count(number) == 1
        assert len(number) == 7
        share = 100 * example.meta["needle_token"] / len(example.input_ids)
        depth = example.meta["depth"]
        # The frame around the haystack takes part of a short prompt, and needles move left to a sentence's end.
        assert abs(share - depth) < (25 if example.length_tokens == 1024 else 15)
        fact = tokenizer.decode(example.input_ids[example.meta["needle_token"] :])
        assert fact.lstrip().startswith("The magic number of ")


def test_needles_follow_a_sentence(tokenizer):
    for example in grid(depths=(10.0, 33.0, 90.0), lengths=(2048,)).examples(tokenizer):
        before = tokenizer.decode(example.input_ids[: example.meta["needle_token"]])
        assert before.rstrip().endswith((".", "!", "?"))


def test_the_question_asks_for_the_hidden_place_and_the_answer_is_begun(tokenizer):
    for example in grid().examples(tokenizer):
        text = tokenizer.decode(example.input_ids)
        fact = text[text.index("The magic number of ") :]
        place = fact.removeprefix("The magic number of ").split(" is ")[0]
        assert text.endswith(f"The magic number of {place} is")


def test_any_subset_reproduces(tokenizer):
    everything = {(e.length_tokens, e.sample): e for e in grid(rounds=2).examples(tokenizer)}
    for part in (grid(lengths=(2048,)), grid(depths=(100.0, 25.0)), grid(rounds=2, samples=5)):
        for example in part.examples(tokenizer):
            assert example == everything[(example.length_tokens, example.sample)]
    assert len(list(grid(rounds=2, samples=5).examples(tokenizer))) == 5
    other = list(grid(seed=1).examples(tokenizer))
    assert all(e.references != everything[(e.length_tokens, e.sample)].references for e in other)


def test_depths_and_lengths_of_a_haystack_share_their_beginning(tokenizer):
    made = {(e.length_tokens, e.meta["depth"]): e for e in grid().examples(tokenizer)}

    def shared(a, b):
        return next(i for i, (x, y) in enumerate(zip(a.input_ids, b.input_ids, strict=False)) if x != y)

    for left, right in (((1024, 50.0), (1024, 100.0)), ((1024, 50.0), (2048, 100.0)), ((2048, 50.0), (2048, 100.0))):
        # Up to a byte or two that the needle happens to have in common with the sentence it displaces.
        assert shared(made[left], made[right]) >= made[left].meta["needle_token"]


def test_without_a_chat_template_prompts_begin_as_the_tokenizer_begins_and_have_no_end():
    """Also where no attribute names the beginning (GLM); an end would have the model go on with something else."""
    from tokenizers import processors

    made = load_tokenizer(BYTES)
    begin, end = made.convert_tokens_to_ids("!"), made.convert_tokens_to_ids("?")
    made.eos_token = "?"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="! ! $A ?", special_tokens=[("!", begin), ("?", end)]
    )
    for example in grid(lengths=(1024,)).examples(made):
        assert len(example.input_ids) <= 1024
        assert example.input_ids[:2] == (begin, begin)
        assert example.input_ids[2] != begin
        assert made.decode(example.input_ids).endswith(" is")
        assert begin not in example.input_ids[2:], "pieces are joined, not begun anew"


def test_a_length_without_room_is_one_line():
    with pytest.raises(SkvError, match="leaves no room for a haystack"):
        list(grid(lengths=(64,)).examples(load_tokenizer(BYTES)))


def test_a_short_haystack_is_repeated_as_far_as_needed(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("One plain sentence follows another here. " * 40)
    example = next(grid(haystack_spec=str(path), lengths=(4096,)).examples(load_tokenizer(BYTES)))
    assert len(example.input_ids) >= 0.98 * 4096


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("few.txt", b"too few words", "too short"),
        ("bin.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"no": "text"}', "'text' field"),
        ("b.json", b"{", "'text' field"),
    ],
)
def test_bad_haystacks_are_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SkvError, match=says):
        haystack(str(tmp_path / name))


def test_json_haystacks(tmp_path):
    text = "Words of a sentence. " * 100
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{text}"}}\n{{"text": "second"}}\n')
    (tmp_path / "b.json").write_text(f'["{text}", "second"]')
    assert haystack(str(tmp_path / "a.jsonl")).text == haystack(str(tmp_path / "b.json")).text


def test_missing_haystacks_name_what_helps(tmp_path, monkeypatch):
    monkeypatch.setenv("SKV_HOME", str(tmp_path))
    with pytest.raises(SkvError, match="skv pull essays"):
        haystack("essays")
    with pytest.raises(SkvError, match="takes essays, synthetic or a file"):
        haystack("esays")


def test_synthetic_prose_is_varied_and_always_the_same():
    text = haystack("synthetic").text
    assert text == haystack("synthetic").text
    sentences = [s for s in text.replace("\n\n", " ").split(". ") if s]
    assert len(set(sentences)) > 0.9 * len(sentences)
    assert not any(c.isdigit() for c in text)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("1234567", 1.0),
        ("It is 1234567.", 1.0),
        ("It is 1,234,567.", 1.0),
        ("12345678", 0.0),
        ("91234567", 0.0),
        ("1234568", 0.0),
        ("", 0.0),
        ("123 4567", 0.0),
        ("1234567 or 7654321", 1.0),
    ],
)
def test_numbers_count_whole_and_only_whole(prediction, score):
    assert contains_number(prediction, "1234567") == score


def test_text_counts_whatever_its_case_and_spacing():
    assert contains_text("in  dolores\nPARK on", "Dolores Park") == 1.0
    assert contains_text("in Dolores", "Dolores Park") == 0.0


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_scores_its_own_answer_one_and_nothing_zero(name):
    if name == "kamradt" and pack_path("essays") is None:
        pytest.skip("the essays are not pulled")
    protocol = PROTOCOLS[name]()
    needle = protocol.needle(0, 1024, 50.0, 0)
    assert protocol.score(needle.fact, needle.reference) == 1.0
    assert protocol.score("", needle.reference) == 0.0
    assert needle.question
    assert protocol.scoring


def test_lengths_and_depths_as_people_write_them():
    assert parse_lengths("1k,2K, 4096,1k", 8192) == (1024, 2048, 4096)
    assert parse_lengths("1m", 2**20) == (2**20,)
    assert parse_depths("5") == (0, 25, 50, 75, 100)
    assert parse_depths("1") == (50,)
    assert parse_depths("50,") == (50,)
    assert parse_depths("0,12.5,100") == (0, 12.5, 100)


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (parse_lengths, "4x", "'4x' is not a length"),
        (parse_lengths, "", "no lengths given"),
        (parse_lengths, "0", "not a length"),
        (parse_lengths, "16k", "beyond this model's context of 8192"),
        (parse_depths, "x", "not a number of depths"),
        (parse_depths, "0", "not a number of depths"),
        (parse_depths, "0,101", "outside 0 to 100"),
        (parse_depths, "a,b", "'a' is not a depth"),
    ],
)
def test_nonsense_is_one_line(parse, text, says):
    with pytest.raises(SkvError, match=says):
        parse(text, 8192) if parse is parse_lengths else parse(text)
