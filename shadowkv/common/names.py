"""Help with misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or nothing if no option is close to `name`."""
    close = difflib.get_close_matches(name.lower(), list(options), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
