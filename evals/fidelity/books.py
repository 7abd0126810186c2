"""Texts to go on in: the pulled essays, a file, or a folder of books."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.common.chat import prompt_ids
from evals.common.seeding import seeded
from evals.common.sources import haystack
from shadowkv.common.errors import SkvError
from shadowkv.common.reading import read_text

_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class Books:
    """Texts by name, and what a reader needs to know to get the same ones."""

    texts: Sequence[tuple[str, str]]
    name: str
    version: str

    @property
    def sha256(self) -> str:
        """Of all texts, in order."""
        return hashlib.sha256("\0".join(text for _, text in self.texts).encode()).hexdigest()


def read_books(data: str) -> Books:
    """`essays` (pulled), `synthetic`, a file as `--haystack` takes, or a folder of .txt and .md files, each a book."""
    folder = Path(data).expanduser()
    if not folder.is_dir():
        found = haystack(data)
        return Books([(found.name, found.text)], found.name, found.version)
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    if not files:
        raise SkvError(f"{data} holds no {' or '.join(_SUFFIXES)} file")
    texts = [(path.relative_to(folder).as_posix(), read_text(path)) for path in files]
    return Books(texts, folder.name, f"{len(files)} files")


@dataclass(frozen=True)
class Window:
    """A prompt and what follows it in its book; both are token ids."""

    book: str
    start: int  # of the prompt, in tokens of the book
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


class Shelf:
    """Books as token ids, and where prompts begin in them: spread out, and the same however many are asked for."""

    def __init__(self, books: Books, tokenizer: Any, seed: int) -> None:
        self._begin = prompt_ids(tokenizer, "", special=True)
        self._ids = [(name, prompt_ids(tokenizer, text, special=False)) for name, text in books.texts]
        self._seed, self._name = seed, books.name

    def apart(self, count: int, length: int, more: int) -> int:
        """How many of the first `count` prompts there are before one overlaps another."""
        taken: list[tuple[str, int]] = []
        for number in range(count):
            window = self.window(number, length, more)
            if any(book == window.book and abs(start - window.start) < length + more for book, start in taken):
                return number
            taken.append((window.book, window.start))
        return count

    def window(self, number: int, length: int, more: int) -> Window:
        """The prompt of this number, exactly `length` tokens, and `more` tokens after it.

        Raises `SkvError` where no book is that long.
        """
        wanted = length - len(self._begin) + more
        books = [(name, ids) for name, ids in self._ids if len(ids) >= wanted]
        if not books:
            longest = max(len(ids) for _, ids in self._ids)
            raise SkvError(
                f"{self._name}: a prompt of {length} tokens and {more} that follow need a longer text: the longest "
                f"has {longest} tokens"
            )
        seeded("books", self._seed).shuffle(books)
        name, ids = books[number % len(books)]
        # The same beginning for every length, so that a prompt holds the shorter ones and they are computed once.
        start = min(int(self._place(number // len(books), name) * len(ids)), len(ids) - wanted)
        end = start + length - len(self._begin)
        return Window(name, start, (*self._begin, *ids[start:end]), tuple(ids[end : end + more]))

    def _place(self, number: int, book: str) -> float:
        """From 0 to 1: halves, then quarters, and so on, from where the seed begins (van der Corput's sequence)."""
        place, share = seeded("place", self._seed, book).random() if self._seed else 0.0, 0.5
        while number:
            place, number, share = place + share * (number % 2), number // 2, share / 2
        return place % 1.0
