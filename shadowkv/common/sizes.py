"""Sizes as users write them: 80GB, 80GiB, 1.5t."""

from __future__ import annotations

import re

from shadowkv.common.errors import SkvError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str, what: str = "size") -> int:
    """Read `80GB` or `80g` (10^9 bytes each), `80GiB` (2^30) or plain bytes. Raises `SkvError` on anything else."""
    found = _SIZE.fullmatch(text.strip())
    unit = 1024 if found and found[3] else 1000
    size = round(float(found[1]) * unit ** _POWERS[found[2].lower()]) if found else 0
    if found is None or size < 1 or (found[3] and not found[2]):
        raise SkvError(f"{what}: '{text}' is not a size; write 80GB (or 80g, 10^9 bytes each) or 80GiB (2^30)")
    return size
