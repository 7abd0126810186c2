"""The house: cli -> evals -> shadowkv, nothing points back; only the command line talks to people."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [p for folder in ("shadowkv", "evals", "cli") for p in sorted((ROOT / folder).rglob("*.py"))]
MAY_USE = {"shadowkv": {"shadowkv"}, "evals": {"evals", "shadowkv"}, "cli": {"cli", "evals", "shadowkv"}}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way_and_only_the_cli_prints(path):
    package = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text())
    used = set(imports(tree))
    assert used & set(MAY_USE) <= MAY_USE[package]
    if package != "cli":
        assert not used & {"typer", "rich"}
        calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert "print" not in calls


def test_nothing_runs_at_import():
    """Modules hold definitions, constants and docstrings; the console script's guard is the one exception."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Expr):
                call = node.value
                docstring = isinstance(call, ast.Constant)
                registers = path.parent.name == "cli" and path.name == "main.py"
                assert docstring or registers, f"{path}:{node.lineno}"
