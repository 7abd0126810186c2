"""Text of models and files made visible: nothing in it can act on a page or a terminal, nor hide."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
_PICTURES = 0x2400  # of the 32 control characters


def visible(text: str, limit_chars: int) -> str:
    """The text with control characters as pictures and invisible ones as code points, cut to a readable size."""
    shown = "".join(c if c in _KEPT or c.isprintable() else _picture(c) for c in text[:limit_chars])
    return shown if len(text) <= limit_chars else f"{shown}… ({len(text) - limit_chars:,} more characters)"


def _picture(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(_PICTURES + code)
    return character if unicodedata.category(character) == "Zs" else f"⟨U+{code:04X}⟩"
