"""Every method does what its authors' rule says: on seeded inputs, the tokens or values that their own code gave.

Each JSON file beside this one holds numbers that came out of the authors' code (or, where it cannot run here, out of
their rule written down again), with the revision and the way they were made. CONTRIBUTING.md says how to make one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from inputs import Inputs, answered, attended, read

from shadowkv.contract.registry import methods, parse_method, prefills

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("*.json"))
OURS = ("full", "oracle")  # what others are measured by: nobody's method


def load(path):
    case = json.loads(path.read_text())
    return case, Inputs(**case["input"])


def method_of(label):
    """`{here}` in a label is the folder of files that its parameters name."""
    return parse_method(label.replace("{here}", str(HERE)))


def subject(label):
    """The method that a file is about, or the prefill of `full+prefill`."""
    method = method_of(label)
    return method.prefill or method.core


def chosen(label, case, given):
    """Which tokens a setting chooses, as the file lists them: of each step, or of the prompt."""
    method = method_of(label)
    return read(method.prefill, given, case["queries"]) if "read" in case else attended(method, given)


def agrees(label, case, given):
    """Whether a setting gives what the file says."""
    if "answers" not in case:
        return chosen(label, case, given) == case.get("attended", case.get("read"))
    return torch.allclose(answered(method_of(label), given), torch.tensor(case["answers"]), rtol=0, atol=case["within"])


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_method_gives_what_its_authors_code_gave(path):
    case, given = load(path)
    assert path.stem.split("-")[0] == subject(case["method"]).name
    if "answers" not in case:
        assert chosen(case["method"], case, given) == case.get("attended", case.get("read"))
    else:
        expected = torch.tensor(case["answers"])
        torch.testing.assert_close(answered(method_of(case["method"]), given), expected, rtol=0, atol=case["within"])


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_another_rule_would_not_pass_for_it(path):
    case, given = load(path)
    assert case["differs_from"], "a file that every setting fits proves nothing"
    assert [label for label in case["differs_from"] if agrees(label, case, given)] == []


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_method_names_the_comparison(path):
    """The class says which revision of whose code was compared, when and how well they agree."""
    case, _ = load(path)
    said = type(subject(case["method"])).compared
    assert said is not None
    for part in ("repository", "revision", "date"):
        assert case["compared"][part] in said
    assert len(case["made"]) > 40, "how the numbers were made is part of the file"


def test_a_method_without_a_file_is_listed_as_not_compared():
    """`skv methods` shows `compared`: it may say something only where a file here holds the method to it."""
    held = {path.stem.split("-")[0] for path in CASES}
    for name, cls in {**methods(), **prefills()}.items():
        assert (cls.compared is not None) == (name in held), name
        assert cls.compared is None or name not in OURS
