"""Text files in other encodings are named as what they are, by every reader; a mark before UTF-8 is no text."""

from __future__ import annotations

import json
import zipfile
from contextlib import suppress

import pytest

from cli.main import main
from evals.common.jsonl import read_jsonl, stream_array
from evals.common.sources import haystack
from evals.longbench.data import Rows
from evals.longbench.prompts import templates
from evals.longbench.tasks import TASKS as LONGBENCH
from evals.longbench.v2 import LongBenchV2
from evals.ruler.files import RulerFiles
from evals.runs.manifest import Manifest
from shadowkv.common.errors import SkvError
from shadowkv.common.reading import decoded
from shadowkv.contract.registry import parse_method
from shadowkv.methods.prefill.minference import MInference
from shadowkv.planning.gpus import find_gpu

hypothesis = pytest.importorskip("hypothesis")  # not on a machine that is there to test kernels
given, st = hypothesis.given, hypothesis.strategies

# A codec -> the text of a test in it, what the error calls it, and what iconv does.
WESTERN = "L'été, où l'élève a mangé la crème brûlée à côté de Noël. "
CHINESE = "长上下文模型的评测需要真实的文本，我们在这里写一些句子。 "
CODECS = {
    "utf-16": (WESTERN, "UTF-16", "UTF-16"),
    "utf-16-le": (WESTERN, "UTF-16", "UTF-16LE"),
    "utf-16-be": (WESTERN, "UTF-16", "UTF-16BE"),
    "utf-16-le chinese": (CHINESE, "UTF-16", "UTF-16LE"),
    "utf-32": (WESTERN, "UTF-32", "UTF-32"),
    "utf-32-le": (CHINESE, "UTF-32", "UTF-32LE"),
    "utf-32-be": (WESTERN, "UTF-32", "UTF-32BE"),
    "gb18030": (CHINESE, "GB18030", "GB18030"),
    "gbk": (CHINESE, "GB18030", "GB18030"),
    "latin-1": (WESTERN, "Latin-1", "LATIN1"),
    "cp1252": (WESTERN, "Latin-1", "LATIN1"),
}


def prose(path, text):
    return text * 250


def row(path, text):
    shared = {"text": text * 250, "input": text, "context": text, "outputs": [text], "answers": [text], "length": 3}
    return json.dumps(shared, ensure_ascii=False) + "\n"


def v2(path, text):
    fields = {"context": text, "question": text, "answer": "A", "difficulty": "easy", "length": "short"}
    return json.dumps([fields | {f"choice_{letter}": text for letter in "ABCD"}], ensure_ascii=False)


def wording(path, text):
    return f"{text} $DOC$ $Q$ $C_A$ $C_B$ $C_C$ $C_D$"


def by_task(path, text):
    return json.dumps(dict.fromkeys(LONGBENCH, f"{text} {{context}}"), ensure_ascii=False)


def gpu(path, text):
    fields = {"memory_bytes": "24GB", "bandwidth_bytes_per_s": 1e12, "link_bytes_per_s": 1e10, "flop_per_s": 1e14}
    return "\n".join(f"{key}: {value}" for key, value in {**fields, "source": f"'{text.replace(chr(39), '')}'"}.items())


def gates(path, text):
    return f"0.5 0.5\n0.5 {text}\n"


def heads(path, text):
    return json.dumps([{text: ["vertical_and_slash", 1, 1]}], ensure_ascii=False)


def run(path, text):
    return json.dumps({"benchmark": text}, ensure_ascii=False)


def from_zip(path):
    archive = path.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as made:
        made.write(path, "hotpotqa.jsonl")
    return Rows(str(archive)).read("hotpotqa")


# A reader's name -> the file it reads, its content, how it is read, and whether it says a line.
READERS = {
    "haystack": ("book.txt", prose, lambda path: haystack(str(path))),
    "haystack rows": ("book.jsonl", row, lambda path: haystack(str(path))),
    "haystack json": ("book.json", row, lambda path: haystack(str(path))),
    "rows": ("any.jsonl", row, lambda path: list(read_jsonl(path))),
    "ruler": ("2048/vt/validation.jsonl", row, lambda path: RulerFiles(path.parents[2], (), ("vt",)).questions(None)),
    "longbench": ("hotpotqa.jsonl", row, lambda path: Rows(str(path.parent)).read("hotpotqa")),
    "longbench zip": ("hotpotqa.jsonl", row, from_zip),
    "longbench templates": ("templates.json", by_task, lambda path: templates(str(path), list(LONGBENCH))),
    "v2": ("data.json", v2, lambda path: LongBenchV2(3500, data=str(path)).questions(None)),
    "v2 wording": ("0shot.txt", wording, lambda path: LongBenchV2(3500, wording=str(path))._template),
    "gpu": ("mine.yaml", gpu, lambda path: find_gpu(str(path))),
    "gates": ("gates.tsv", gates, lambda path: parse_method(f"duo:heads={path}").gates()),
    "patterns": ("heads.json", heads, lambda path: MInference(heads=str(path))._table),
    "run.json": ("run.json", run, Manifest.read),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_the_encoding(tmp_path, reader, codec):
    name, made, read = READERS[reader]
    text, called, option = CODECS[codec]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made(path, text).encode(codec.partition(" ")[0]))
    with pytest.raises(
        SkvError, match=rf"{called}.* text, not UTF-8: convert it with iconv -f {option} -t UTF-8$"
    ) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert path.stem in str(caught.value)


@pytest.mark.parametrize("reader", [name for name in READERS if name not in ("gates", "patterns", "run.json")])
@pytest.mark.parametrize("text", [WESTERN, CHINESE], ids=["western", "chinese"])
def test_a_mark_before_utf_8_is_none_of_the_text(tmp_path, reader, text):
    name, made, read = READERS[reader]
    found = []
    for codec in ("utf-8", "utf-8-sig"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made(path, text).encode(codec))
        found.append(read(path))
    if reader not in ("longbench templates",):  # which says the file's checksum
        assert found[0] == found[1]


def test_the_line_is_said_where_it_begins():
    good = json.dumps({"text": CHINESE}, ensure_ascii=False).encode() + b"\n"
    with pytest.raises(SkvError, match=r"^rows, line 3, seems to be Latin-1"):
        decoded(good * 2 + WESTERN.encode("latin-1"), "rows")
    with pytest.raises(SkvError, match=r"^rows, line 7, seems to be GB18030"):
        decoded(CHINESE.encode("gbk"), "rows", 7)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_what_is_utf_8_stays_as_it_is(text):
    kept = text.removeprefix("\ufeff")
    assert decoded(text.encode(), "any") == kept
    assert decoded(kept.encode("utf-8-sig"), "any") == kept


@given(st.binary(max_size=200))
def test_anything_else_is_one_line(raw):
    with suppress(UnicodeDecodeError):
        raw.decode()
        return
    with pytest.raises(SkvError, match="not UTF-8"):
        decoded(raw, "any")


@given(st.sampled_from([c for c in CODECS if " " not in c]), st.integers(1, 30), st.integers(0, 40))
def test_the_name_does_not_depend_on_where_a_text_begins(codec, times, skipped):
    text, _, option = CODECS[codec]
    whole = (text * (times + 2))[skipped:]
    with pytest.raises(SkvError, match=f"iconv -f {option} "):
        decoded(whole.encode(codec), "any")


def test_a_commands_user_gets_one_line(tiny_folder, tmp_path, capsys):
    (tmp_path / "book.txt").write_text(WESTERN * 40, encoding="utf-16")
    words = ["eval", "niah", "--model", str(tiny_folder), "--lengths", "512"]
    assert main([*words, "--haystack", str(tmp_path / "book.txt")]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"skv: haystack {tmp_path / 'book.txt'} is UTF-16 text, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8\n"
    )


def test_a_streamed_array_may_begin_with_a_mark(tmp_path):
    (tmp_path / "a.json").write_text('[1, "é"]', encoding="utf-8-sig")
    assert list(stream_array(tmp_path / "a.json")) == [1, "é"]
