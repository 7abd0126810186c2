"""What others said, fit for a line of our own."""

from __future__ import annotations

_MAX_CHARS = 200


def plain_line(text: str) -> str:
    """Text as one line that can neither break it nor move a cursor nor turn its direction."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def one_line(error: BaseException) -> str:
    """An exception's message as a plain line, cut to a readable length."""
    said = plain_line(str(error))
    if not said:
        return type(error).__name__
    return said if len(said) <= _MAX_CHARS else said[: _MAX_CHARS - 1] + "…"
