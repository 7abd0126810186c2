"""Prompt lengths as users write them."""

from __future__ import annotations

from shadowkv.common.errors import SkvError


def parse_lengths(text: str, context_tokens: int | None, option: str = "--lengths") -> tuple[int, ...]:
    """Read `1k,2k,4096`; k is 1024 tokens. Raises `SkvError` on nonsense and beyond the context, if one is given."""
    lengths = []
    for item in filter(None, (part.strip().lower() for part in text.split(","))):
        digits, factor = (item[:-1], 1024) if item.endswith("k") else (item, 1)
        digits, factor = (item[:-1], 1024 * 1024) if item.endswith("m") else (digits, factor)
        if not digits.isdecimal() or int(digits) == 0:
            raise SkvError(f"'{item}' is not a length; write tokens as 4096 or 4k (k = 1024)")
        tokens = int(digits) * factor
        if context_tokens is not None and tokens > context_tokens:
            raise SkvError(f"length {item} ({tokens} tokens) is beyond this model's context of {context_tokens} tokens")
        lengths.append(tokens)
    if not lengths:
        raise SkvError(f"no lengths given; for example {option} 1k,2k,4k")
    return tuple(dict.fromkeys(lengths))
