"""Where the newest tokens of every row of a batch lie, as the host counts them without asking the device.

A row's tail takes a token per step. Once it holds `window` generated tokens and a whole chunk more, its oldest chunk
goes to the context. So everything about a row follows from its prompt and from how many tokens it was fed, and a step
walks over no rows: it adds one to a number, and compares it with when the next chunk is due.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from shadowkv.tensors.stacking import Stackable


@dataclass(frozen=True)
class RowTail:
    """A row: what its prompt left, and how many tokens came since."""

    context_tokens: int  # of the prompt: in chunks that can be chosen, or outliers
    landmarks: int  # of the prompt
    tail_tokens: int  # of the prompt, kept as they are
    fed_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.context_tokens + self.tail_tokens + self.fed_tokens

    def chunks_gone(self, chunk: int, window: int) -> int:
        """Chunks of its tail that went to the context."""
        return max(0, (self.fed_tokens - window) // chunk)


class Tails(Stackable):
    """The tails of a batch."""

    def __init__(self, rows: Sequence[RowTail], chunk: int, window: int) -> None:
        self._rows, self._later = list(rows), 0  # as they were `_later` tokens ago
        self._chunk, self._window = chunk, window
        self._most_tokens = max(row.tokens for row in rows)
        # By their remainder, the tokens with which the first row gives up a chunk; others follow at whole chunks.
        self._due: dict[int, int] = {}
        for row in rows:
            first = window + chunk - row.fed_tokens
            self._due[first % chunk] = min(first, self._due.get(first % chunk, first))
        self._lasting: tuple[tuple[int, int], int] | None = None  # room, and the tokens that it is enough for

    @property
    def rows(self) -> list[RowTail]:
        return self._after(0)

    @property
    def most_tokens(self) -> int:
        """Of the longest row."""
        return self._most_tokens + self._later

    def append(self) -> None:
        """Count one more token in every row."""
        self._later += 1

    @property
    def due(self) -> bool:
        """Whether some row's oldest chunk has to go before the latest token is written."""
        due = self._due.get(self._later % self._chunk)
        return due is not None and self._later >= due

    def outgrew(self, context_tokens: int, landmarks: int) -> bool:
        """Whether there is a row that now holds more than this."""
        room = context_tokens, landmarks
        if self._lasting is None or self._lasting[0] != room:
            chunks = [
                min((context_tokens - row.context_tokens) // self._chunk, landmarks - row.landmarks)
                for row in self._rows
            ]
            ends = [
                self._window + (count + 1) * self._chunk - row.fed_tokens
                for count, row in zip(chunks, self._rows, strict=True)
            ]
            self._lasting = room, min(ends)
        return self._later >= self._lasting[1]

    def landmarks(self, later: int = 0) -> list[int]:
        """Of every row, so many tokens later."""
        return [row.landmarks + row.chunks_gone(self._chunk, self._window) for row in self._after(later)]

    def most_after(self, tokens: int) -> tuple[int, int]:
        """Of the rows with most of them so many tokens later: context tokens, landmarks."""
        contexts = [
            row.context_tokens + row.chunks_gone(self._chunk, self._window) * self._chunk for row in self._after(tokens)
        ]
        return max(contexts), max(self.landmarks(tokens))

    def _after(self, tokens: int) -> list[RowTail]:
        return [replace(row, fed_tokens=row.fed_tokens + self._later + tokens) for row in self._rows]

    def shape_of_a_row(self) -> Hashable:
        return (self._chunk, self._window)

    @classmethod
    def stack(cls, rows: list[Tails]) -> Tails:
        first = rows[0]
        return cls([tail for row in rows for tail in row.rows], first._chunk, first._window)

    def pick(self, rows: list[int]) -> Tails:
        held = self.rows
        return Tails([held[row] for row in rows], self._chunk, self._window)
