"""Tables as rows of text, for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shadowkv.common.wording import plain_line

# A caption is not escaped by pandas.
_TEX_TEXT = (
    ("\\", r"\textbackslash "),
    *((sign, f"\\{sign}") for sign in "&%$#_{}"),
    ("~", r"\textasciitilde "),
    ("^", r"\textasciicircum "),
)


@dataclass(frozen=True)
class Table:
    """The first `names` columns say what a row is; the others are numbers. A repeated name may be left empty."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    names: int = 1
    shaded: bool = False  # the numbers are percentages, which a page may colour

    def markdown(self) -> str:
        """The table in Markdown, under its title."""
        rule = ["---"] * self.names + ["---:"] * (len(self.columns) - self.names)
        lines = [f"## {self.title}", "", _line(self.columns), "|" + "|".join(rule) + "|"]
        lines += map(_line, self.rows)
        lines += ["", self.caption] if self.caption else []
        return "\n".join(lines) + "\n"


def latex(table: Table, notes: Sequence[str], remarks: Sequence[str] = ()) -> str:
    """A tabular; what a reader must know stands in its caption, behind the title, and remarks below as comments."""
    import pandas as pd

    columns = [head.replace("\n", " ") for head in table.columns]
    align = "l" * table.names + "r" * (len(columns) - table.names)
    body = pd.DataFrame([list(row) for row in table.rows], columns=columns)
    said = plain_line(". ".join([table.title, *notes]))  # an empty line would end the caption
    for sign, spelled in _TEX_TEXT:
        said = said.replace(sign, spelled)
    shown: str = body.to_latex(index=False, escape=True, column_format=align, caption=said)
    # Unescaped by pandas: what LaTeX engines without UTF-8 input would stumble over.
    for sign, spelled in (("±", r"$\pm$"), ("–", "--"), ("·", r"$\cdot$")):
        shown = shown.replace(sign, spelled)
    return shown + "".join(f"% {plain_line(remark)}\n" for remark in remarks)


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
