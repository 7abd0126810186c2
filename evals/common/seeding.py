"""Random streams that depend on what they are for and nothing else, so that any subset of a run reproduces."""

from __future__ import annotations

import hashlib
import random


def seeded(*parts: object) -> random.Random:
    """A generator for exactly these parts: seed, length, depth, round, ..."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
