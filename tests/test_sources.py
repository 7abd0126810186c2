"""Haystack files as people's tools write them."""

from __future__ import annotations

import json

import pytest

from evals.common.sources import haystack
from shadowkv.common.errors import SkvError

PROSE = "Words of a sentence. " * 100


def test_a_mark_at_the_beginning_is_no_text(tmp_path):
    (tmp_path / "plain.txt").write_text(PROSE, encoding="utf-8")
    (tmp_path / "marked.txt").write_text(PROSE, encoding="utf-8-sig")
    assert haystack(str(tmp_path / "marked.txt")).sha256 == haystack(str(tmp_path / "plain.txt")).sha256
    (tmp_path / "marked.json").write_text(json.dumps([PROSE]), encoding="utf-8-sig")
    assert haystack(str(tmp_path / "marked.json")).text == PROSE


def test_only_line_feeds_end_a_row(tmp_path):
    """JSON allows U+2028 and U+0085 inside a string; str.splitlines would cut the row there."""
    text = PROSE + "one\u2028two\u0085three"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert haystack(str(tmp_path / "a.jsonl")).text == text


def test_half_a_character_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": PROSE + "\ud800"}))
    with pytest.raises(SkvError, match=r"haystack .*a\.json: a text holds half a character"):
        haystack(str(tmp_path / "a.json"))


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_an_array_is_streamed_item_by_item(tmp_path, chunk):
    from evals.common.jsonl import stream_array

    items = [{"a": [1, 2], "b": "x]},{"}, 3, "é", [], {"c": None}]
    path = tmp_path / "array.json"
    path.write_text(" \n" + json.dumps(items, indent=1), encoding="utf-8")
    if chunk > 2:  # the opening bracket is in the first chunk
        assert list(stream_array(path, chunk)) == items
    path.write_text('[{"a": 1}, {"b"', encoding="utf-8")
    with pytest.raises(SkvError, match="ends in the middle"):
        list(stream_array(path, chunk))
