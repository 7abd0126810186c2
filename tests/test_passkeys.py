"""Texts that gates are learnt from: codes out of reach, asked for at the end."""

from __future__ import annotations

import pytest

from evals.calibration.passkeys import passkeys
from shadowkv.common.errors import SkvError
from shadowkv.models.loading import load_tokenizer
from shadowkv.models.presets import find_preset
from shadowkv.models.resolving import ModelSource


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    return load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))


def made(tokenizer, tokens=3000, seed=0, sinks=128, recent=256):
    filler = tokenizer("The tide came in slowly over the grey stones. " * 30)["input_ids"]
    return passkeys(tokenizer, filler, tokens, sinks, recent, seed)


@pytest.mark.parametrize("seed", range(4))
def test_every_code_that_is_asked_for_is_hidden_out_of_reach(tokenizer, seed):
    found = made(tokenizer, seed=seed)
    assert found.text.shape[1] + found.answers.shape[1] == 3000
    text, answers = (tokenizer.decode(ids[0]) for ids in (found.text, found.answers))
    codes = tokenizer.decode(found.answers[0][found.counted]).split(" ", 1)[1]
    told = [line.partition("The ")[2].rstrip(".") for line in answers.split("\n\n") if line]
    assert len(told) == 6
    for sentence in told:
        assert sentence.partition(" is ")[2] in codes
        # The byte tokenizer gives a position in the text for a position in tokens.
        assert 128 <= text.index(f"The {sentence}.") < len(text) - 256
        assert text.count(sentence) == 1


def test_the_seed_decides_everything(tokenizer):
    one, same, other = made(tokenizer), made(tokenizer), made(tokenizer, seed=1)
    assert one.text.tolist() == same.text.tolist()
    assert one.answers.tolist() == same.answers.tolist()
    assert one.answers.tolist() != other.answers.tolist()
    assert one.text.tolist() != other.text.tolist()


def test_a_text_begins_as_the_tokenizer_begins_texts(tokenizer):
    filler = [tokenizer.all_special_ids[0], *tokenizer("word " * 400, add_special_tokens=False)["input_ids"]]
    text = passkeys(tokenizer, filler, 3000, 16, 64, 0).text[0].tolist()
    assert text[0] == filler[0]
    assert filler[0] not in text[1:]


def test_texts_without_room_are_refused(tokenizer):
    with pytest.raises(SkvError, match="--tokens 1200 leaves no room for 6 codes between 128 sinks and 256 recent"):
        made(tokenizer, tokens=1200)
