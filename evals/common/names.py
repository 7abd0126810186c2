"""Names of tasks as users list them."""

from __future__ import annotations

from collections.abc import Iterable

from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean


def choose_tasks(text: str, known: Iterable[str], default: tuple[str, ...]) -> tuple[str, ...]:
    """Read `all` or `vt,qa_1`, in the benchmark's own order; raises `SkvError` on unknown names."""
    names = list(known)
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if asked == ["all"]:
        return default
    for name in asked:
        if name not in names:
            raise SkvError(f"unknown task '{name}'{did_you_mean(name, names)}; tasks: all, {', '.join(names)}")
    if not asked:
        raise SkvError(f"no tasks given; tasks: all, {', '.join(names)}")
    return tuple(name for name in names if name in asked)
