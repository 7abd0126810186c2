"""docs/methods/: every method and prefill has a page, whose parameters, bytes and revisions are those of the code."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from cli.main import main
from shadowkv.contract.registry import methods, prefills
from shadowkv.contract.setting import format_value

DOCS = Path(__file__).parent.parent / "docs"
SETTINGS = {**methods(), **prefills()}
HELD = re.compile(r"per prompt token: ([\d,]+) bytes on the device, ([\d,]+) on\s+the host")


def page(name):
    return (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")


def rows(text):
    """The cells of every table row but headings."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, cells in enumerate(lines) if set("".join(cells)) <= {"-", ":"}]
    return [cells for i, cells in enumerate(lines) if i not in rules and i + 1 not in rules]


def section(text, heading):
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def test_every_method_has_a_page_and_every_page_a_method():
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} == set(SETTINGS)


def test_the_overview_links_every_page_once():
    overview = (DOCS / "methods.md").read_text(encoding="utf-8")
    names = [re.fullmatch(r"\[`(\w+)`\]\(methods/\1\.md\)", cells[0]) for cells in rows(overview)]
    assert sorted(found[1] for found in names if found) == sorted(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_page_lists_the_parameters_and_defaults_of_the_class(name):
    listed = [(cells[0].strip("`"), cells[1].strip("`")) for cells in rows(section(page(name), "Parameters"))]
    assert listed == [(f.name, format_value(f.default)) for f in fields(SETTINGS[name])]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_page_names_its_paper_and_the_revisions_that_the_code_was_compared_with(name):
    text = page(name)
    assert f"https://arxiv.org/abs/{SETTINGS[name].paper}" in text
    for revision in re.findall(r"[\w.-]+/[\w.-]+@[0-9a-f]+", SETTINGS[name].compared or ""):
        assert revision in text


def test_pages_name_the_bytes_that_the_command_line_does(capsys):
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == list(methods())
    for row in listed:
        held = row["bytes_per_token"]
        assert (held["model"], held["dtype"]) == ("llama3.1-8b", "bfloat16")
        said = HELD.search(section(page(row["name"]), "Cost"))
        assert said, f"{row['name']}: no bytes per prompt token"
        assert [int(x.replace(",", "")) for x in said.groups()] == [held["device"], held["host"]], row["name"]
