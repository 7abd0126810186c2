"""Sizes as people write them."""

from __future__ import annotations

import re

from shadowkv.errors import SkvError

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: str) -> int:
    """Read `80GB` (10^9 bytes each) or `24GiB` (2^30). Raises `SkvError` on anything else, and on nothing at all."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if found is None or float(found[1]) <= 0 or (found[3] and not found[2]):
        raise SkvError(f"'{text}' is not a size; write 80GB (10^9 bytes) or 24GiB (2^30 bytes)")
    return int(float(found[1]) * (_BINARY if found[3] else _DECIMAL)[found[2]])
