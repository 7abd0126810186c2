"""Batches as users write them."""

from __future__ import annotations

from itertools import pairwise

from shadowkv.common.errors import SkvError


def parse_batches(text: str) -> tuple[int, ...] | None:
    """Read `1,2,4`; None for `auto`. Raises `SkvError` on anything but ascending positive numbers."""
    if text.strip().lower() == "auto":
        return None
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items or not all(item.isdecimal() for item in items):
        raise SkvError(f"'{text}' is not a list of batches; write 1,2,4 or auto")
    batches = tuple(map(int, items))
    if 0 in batches:
        raise SkvError("a batch must be at least 1, got 0")
    if any(later <= earlier for earlier, later in pairwise(batches)):
        raise SkvError(f"batches are tried in ascending order; write {','.join(map(str, sorted(set(batches))))}")
    return batches
