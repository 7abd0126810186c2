"""README.md and docs/: every command is one that is taken, every link leads somewhere, every example runs, every
message is one that can be met, and every generated block is what `make docs` would write."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from cli.main import app
from cli.shared.choosing import parse_specs

ROOT = Path(__file__).parent.parent
README_LINES = 180
COLUMNS = 120


def _make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_docs = _make_docs()
GENERATED = make_docs.pages()
PAGES = [*GENERATED, ROOT / "CONTRIBUTING.md"]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fenced(text, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def prose(text):
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text):
    """Commands of `skv` in the examples, between backticks, and in generated blocks, each as it would be typed."""
    shell = "\n".join(fenced(text, "bash")).replace("\\\n", " ")
    lines = [part.strip() for line in shell.splitlines() for part in re.split(r"\s#\s|&&|\s{2,}#", line)]
    spans = [" ".join(span.split()) for span in re.findall(r"`(skv [^`]*)`", prose(text))]
    outputs = [
        block.partition(" -- ")[0] for block in re.findall(r"^<!-- output: (.*) -->$", prose(text), re.MULTILINE)
    ]
    return [line for line in (*lines, *spans, *outputs) if line.startswith("skv ")]


def taken(command):
    """Parse a command without running it: typer's error where it would not be taken."""
    words = shlex.split(command)[1:]
    found, name = typer.main.get_command(app), "skv"
    while hasattr(found, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in found.commands, f"{command}: there is no {name}"
        found = found.commands[name]
    if hasattr(found, "commands"):
        known = {option for param in found.params for option in param.opts} | {"--help"}
        assert set(words) <= known, command
    elif words:  # the name alone is a mention
        given = found.make_context(name, words).params
        parse_specs(given.get("methods") or ())


@pages
def test_commands_are_taken(page):
    for command in commands(page.read_text()):
        taken(command)


def test_all_commands_are_shown_somewhere():
    shown = " ".join(command for page in GENERATED for command in commands(page.read_text()))

    def leaves(group, words):
        for name, found in group.commands.items():
            if hasattr(found, "commands"):
                yield from leaves(found, [*words, name])
            else:
                yield " ".join([*words, name])

    missing = [line for line in leaves(typer.main.get_command(app), ["skv"]) if line not in shown]
    assert not missing


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page.read_text())):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} is not there"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(there.read_text()), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{target}: no such heading"


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_blocks_are_fresh(page):
    text = page.read_text()
    assert make_docs.filled(text) == text, "run `make docs`"


def test_a_block_that_cannot_be_made_says_what_there_is():
    for asked, said in (
        ("table: niah-nowhere", "no run folder niah-nowhere"),
        ("table: niah-smollm2-135m-demo columns=scor", "there are: method, length, score"),
        ("table: niah-smollm2-135m-demo title=Scores", "there are: Score and cost"),
        ("table: niah-smollm2-135m-demo rows=tova", "no row is left"),
        ("table: niah-smollm2-135m-demo row=full", "known: title, columns, rows"),
        ("output: skv plan --modle llama3.1-8b", "exit code 2: skv: No such option"),
    ):
        with pytest.raises(ValueError, match=said):
            make_docs.filled(f"<!-- {asked} -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no <!-- end -->"):
        make_docs.filled("<!-- table: niah-smollm2-135m-demo -->\n")


def test_rows_and_columns_are_those_asked_for():
    asked = '<!-- table: niah-smollm2-135m-demo columns="method,score" rows="quest full" where="length=4k" -->'
    lines = make_docs.filled(f"{asked}\nold\n<!-- end -->\n").splitlines()
    assert lines == [
        asked,
        "",
        "| method | score |",
        "|---|---:|",
        "| full | 1.00 |",
        "| quest:budget=256 | 0.20 |",
        "",
        "<!-- end -->",
    ]
    assert make_docs.filled(f"```\n{asked}\n```\n") == f"```\n{asked}\n```\n"


def test_what_a_run_says_at_every_table_stands_below_its_block():
    asked = "table: kernels-compiled title='Compiled kernels' columns=kernel"
    made = make_docs.filled(f"<!-- {asked} -->\n<!-- end -->\n")
    assert "\n*checked on a CPU in Triton's interpreter" in made
    assert "checked" not in make_docs.filled(f"<!-- {asked} notes=no -->\n<!-- end -->\n")


def test_python_examples_run():
    namespace = {}
    examples = fenced((ROOT / "docs" / "library.md").read_text(), "python")
    assert len(examples) >= 3
    for example in examples:
        exec(compile(example, "docs/library.md", "exec"), namespace)


def test_messages_are_those_of_the_code():
    code = [literal for folder in ("cli", "evals", "shadowkv") for literal in _literals(ROOT / folder)]
    rows = re.findall(r"^\| `([^`]*)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 50
    for message in rows:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))))
        assert any(pattern.search(literal) for literal in code), message


def _literals(folder):
    """Every text of the code, with a sign in place of what is put into it."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)


def test_pages_are_short_and_narrow():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
    for page in GENERATED:
        text = re.sub(r"^(<!-- (table|output): ).*?^<!-- end -->$", "", page.read_text(), flags=re.M | re.S)
        wide = [line for line in text.splitlines() if len(line) > COLUMNS and not line.startswith(("|", "!"))]
        assert not wide, page.name
