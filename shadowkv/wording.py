"""What other libraries said, fit for a line of our own."""

from __future__ import annotations

_MAX_CHARS = 200


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks and control characters, cut to a readable length."""
    said = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    if not said:
        return type(error).__name__
    return said if len(said) <= _MAX_CHARS else said[: _MAX_CHARS - 1] + "…"
