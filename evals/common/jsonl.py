"""JSON files of many objects, read one by one: lines with errors that say where, and long arrays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shadowkv.common.errors import SkvError
from shadowkv.common.reading import decoded


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
        text = decoded(line, name, number)
        try:
            row = json.loads(text)
        except ValueError:
            raise SkvError(f"{name}, line {number}: not JSON") from None
        if not isinstance(row, dict):
            raise SkvError(f"{name}, line {number}: not a JSON object")
        yield number, row


def check_text(where: str, *texts: str) -> None:
    """Refuse texts that no tokenizer takes: JSON can spell half a character."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise SkvError(f"{where}: a text holds half a character") from None


def stream_array(path: Path, chunk_characters: int = 1 << 20) -> Iterator[Any]:
    """Items of a JSON array, without ever holding the whole file or all of its objects."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        held = file.read(chunk_characters).lstrip()[1:]
        while True:
            held = held.lstrip(" \t\r\n,")
            if held.startswith("]"):
                return
            try:
                item, end = decoder.raw_decode(held)
            except ValueError:
                more = file.read(chunk_characters)
                if not more:
                    raise SkvError(f"{path} ends in the middle of its array") from None
                held += more
            else:
                yield item
                held = held[end:]
