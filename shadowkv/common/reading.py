"""Text files of a user's: UTF-8 with or without a mark, and by its name what is something else."""

from __future__ import annotations

import codecs
from pathlib import Path

from shadowkv.common.errors import SkvError

_MARKS = (  # the longer ones first: one of UTF-32 begins like one of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_LOOKED_AT_BYTES = 1 << 16


def read_text(path: Path, what: str = "") -> str:
    """A whole file. Raises `SkvError` naming its encoding if that is not UTF-8, and `OSError` if it cannot be read.

    what: what an error calls the file, for which it says its path.
    """
    return decoded(path.read_bytes(), what or str(path))


def decoded(raw: bytes, what: str, line: int | None = None) -> str:
    """The text of bytes that should be UTF-8; a mark at their beginning is none of it.

    line: of a larger file, which these bytes are. Raises `SkvError` with what they are instead.
    """
    where = what if line is None else f"{what}, line {line},"
    marked = next((name for mark, name in _MARKS if raw.startswith(mark)), None)
    if marked is not None:
        raise _refused(where, f"is {marked} text", marked)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if (wide := _wide(raw, least=0)) is not None:
            raise _refused(where, f"is {wide[:6]} text", wide) from None
        if b"\0" in raw[:_LOOKED_AT_BYTES]:
            raise SkvError(f"{where} is not UTF-8 text, nor any other: it holds zero bytes") from None
        if line is None:
            where = f"{what}, line {raw.count(bytes([10]), 0, error.start) + 1},"
        begins = max(error.start - _LOOKED_AT_BYTES, 0)
        narrow = _narrow(raw[begins : error.start + _LOOKED_AT_BYTES])
        known = {"GB18030": "GB18030 (GBK)", "LATIN1": "Latin-1 (ISO-8859-1)"}[narrow]
        raise _refused(where, f"seems to be {known} text", narrow) from None
    # Latin letters in UTF-16 are also valid UTF-8, every other one a zero.
    if b"\0" in raw[:_LOOKED_AT_BYTES] and (wide := _wide(raw, least=0.2)) is not None:
        raise _refused(where, f"is {wide[:6]} text", wide)
    return text


def _refused(where: str, what: str, option: str) -> SkvError:
    return SkvError(f"{where} {what}, not UTF-8: convert it with iconv -f {option} -t UTF-8")


def _wide(raw: bytes, least: float) -> str | None:
    """UTF-16 or UTF-32 without a mark, by its zeros, whose share must be more than `least`, or else by its look."""
    head = raw[: _LOOKED_AT_BYTES // 4 * 4]
    zeros = [head[place::4].count(0) for place in range(4)]
    if sum(zeros) > max(least, 0.45) * len(head) and (min(zeros[:2]) or min(zeros[2:])):
        return "UTF-32BE" if zeros[0] > zeros[3] else "UTF-32LE"
    if sum(zeros) < least * len(head):
        return None
    share, order = max((_plausible(head, order), order) for order in ("UTF-16LE", "UTF-16BE"))
    sure = share > (0.5 if sum(zeros) else 0.9)
    return order if sure and _letters(head) < 0.8 * len(head) else None


def _plausible(raw: bytes, order: str) -> float:
    """The share of characters that would be Latin, or Chinese, or the marks of either."""
    text = raw.decode(order, "replace")
    blocks = ((0x20, 0x17F), (0x2000, 0x206F), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xFF00, 0xFF5F), (9, 13))
    return sum(any(low <= ord(c) <= high for low, high in blocks) for c in text) / max(len(text), 1)


def _letters(raw: bytes) -> int:
    """How many bytes are printable ASCII, two of which look like an ideograph."""
    return sum(0x20 <= byte < 0x7F for byte in raw)


def _narrow(raw: bytes) -> str:
    """Latin-1, or GB18030 where most of what is not ASCII would be the common characters of Chinese."""
    outside = [character.encode("gb18030") for character in raw.decode("gb18030", "replace") if ord(character) > 127]
    common = sum(len(code) == 2 and 0xA1 <= code[0] <= 0xD7 and code[1] >= 0xA1 for code in outside)
    return "GB18030" if common > 0.7 * len(outside) else "LATIN1"
