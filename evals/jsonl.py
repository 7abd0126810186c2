"""Lines of JSON objects, with errors that say where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shadowkv.errors import SkvError


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a file, empty lines left out."""
    try:
        with path.open("rb") as file:
            yield from parse_jsonl(file, str(path))
    except OSError as error:
        raise SkvError(f"{path} cannot be read: {error.strerror}") from None


def parse_jsonl(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same for lines from anywhere; `name` is what an error calls them."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise SkvError(f"{name}, line {number}: not JSON") from None
        if not isinstance(row, dict):
            raise SkvError(f"{name}, line {number}: not a JSON object")
        yield number, row
