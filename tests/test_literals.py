"""Settings of other people's files, read without running them."""

from __future__ import annotations

import pytest

from evals.common.literals import literals
from evals.niah.protocols import Kamradt
from shadowkv.common.errors import SkvError


def test_constants_are_read_wherever_they_are_assigned(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "import nothing_that_exists\nplain = 'a'\nannotated: str = 'b'\nbare: int\ncomputed = len('c')\n"
        "first = second = 1\nraise SystemExit\n\nclass Settings:\n    plain: dict = {'d': [2]}\n"
    )
    assert literals(path) == {"plain": ["a", {"d": [2]}], "annotated": ["b"], "first": [1]}


def test_a_file_that_is_no_python_is_one_line(tmp_path):
    (tmp_path / "a.py").write_text("def")
    for name in ("a.py", "nowhere.py"):
        with pytest.raises(SkvError, match="pull its pack again"):
            literals(tmp_path / name)


def test_kamradts_needle_is_a_default_of_the_packages_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("evals.niah.protocols.essays_folder", lambda: tmp_path)
    settings = "class Settings:\n    needle: str = ' A fact.\\n'\n"
    (tmp_path / "run.py").write_text(f"{settings}    retrieval_question: str = 'Which?'\n")
    needle = Kamradt().needle(0, 1024, 50.0, 0)
    assert (needle.fact, needle.question) == ("A fact.", "Which?")
    for lacking in (settings, f"{settings}    retrieval_question: int = 3\n"):
        (tmp_path / "run.py").write_text(lacking)
        with pytest.raises(SkvError, match="lack Kamradt's needle"):
            Kamradt().needle(0, 1024, 50.0, 0)
