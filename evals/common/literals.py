"""Constants of a Python file, read without running it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from shadowkv.common.errors import SkvError


def literals(path: Path) -> dict[str, list[Any]]:
    """Every `name = <literal>` in the file, annotated or not, at any depth: name -> its values, in order."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise SkvError(f"{path} cannot be read ({error}); pull its pack again with --force") from None
    found: dict[str, list[Any]] = {}
    for node in ast.walk(tree):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name), *_], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                try:
                    constant = ast.literal_eval(value)
                except ValueError:
                    continue  # computed, not a literal
                found.setdefault(name, []).append(constant)
    return found
