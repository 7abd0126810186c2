"""String constants of a Python file, read without running it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from shadowkv.errors import SkvError


def literals(path: Path) -> dict[str, list[Any]]:
    """Every plain `name = <literal>` in the file, at any depth: name -> its values, in order."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise SkvError(f"{path} cannot be read ({error}); pull its pack again with --force") from None
    found: dict[str, list[Any]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found.setdefault(node.targets[0].id, []).append(ast.literal_eval(node.value))
            except ValueError:
                continue  # computed, not a literal
    return found
