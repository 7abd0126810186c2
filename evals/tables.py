"""Tables as rows of text, for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """The first `names` columns say what a row is; the others are numbers. A repeated name may be left empty."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    names: int = 1

    def markdown(self) -> str:
        """The table in Markdown, under its title."""
        rule = ["---"] * self.names + ["---:"] * (len(self.columns) - self.names)
        lines = [f"## {self.title}", "", _line(self.columns), "|" + "|".join(rule) + "|"]
        lines += map(_line, self.rows)
        lines += ["", self.caption] if self.caption else []
        return "\n".join(lines) + "\n"


def number(value: float | None, spec: str) -> str:
    """A number in a format, or a dash where there is none."""
    return "–" if value is None else format(value, spec)


def mib(value: float | None) -> str:
    """Bytes in MiB."""
    return "–" if value is None else f"{value / 2**20:.1f}"


def kib(value: float | None) -> str:
    """Bytes in KiB."""
    return "–" if value is None else f"{value / 2**10:.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage, without the sign."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def tokens(count: int) -> str:
    """A number of tokens, k = 1024."""
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
