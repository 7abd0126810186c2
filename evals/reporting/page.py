"""One HTML file that needs no network: styles, scripts, plots and data inside, under a policy against all else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from evals.reporting.sections import Section, environment
from evals.tables.table import Table

_TEMPLATES = "evals.reporting"
_GREY = re.compile(r"#([0-9a-f]{2})\1\1\b")
_BLACK, _WHITE = 0xE8, 0x16  # of a plot, on a dark page: what stands for black, and what for white
_SHADES = 10


@dataclass(frozen=True)
class Drawing:
    """A plot as data URIs, for a light and for a dark page."""

    name: str
    light: str
    dark: str
    width_px: int


def render_report(
    title: str, sections: Sequence[Section], left_out: Mapping[str, str], samples: Mapping[str, Any]
) -> str:
    """The report as HTML. Everything that comes from a run is escaped, or data that only scripts read."""
    shown = [
        {
            "section": section,
            "commands": section.run.manifest.commands,
            "environment": environment(section.run),
            "drawings": [drawing(path) for path in section.plots],
        }
        for section in sections
    ]
    return _render("report.html.j2", "report.js", title=title, shown=shown, left_out=left_out, samples=_json(samples),
                   answers=len(samples["rows"]))  # fmt: skip


def render_leaderboard(title: str, **content: Any) -> str:
    """The ranking as HTML."""
    return _render("leaderboard.html.j2", "leaderboard.js", title=title, **content)


def _render(template: str, script: str, **content: Any) -> str:
    made = Environment(
        loader=PackageLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"shade": shade, "order": order}
    style, code = _text("page.css"), _grid() + _text(script)
    policy = (
        f"default-src 'none'; script-src '{_hash(code)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return made.get_template(template).render(policy=policy, style=_Safe(style), script=_Safe(code), **content)


class _Safe(str):
    """Text of our own that goes into a page as it is."""

    def __html__(self) -> str:
        return str(self)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(name: str) -> str:
    return (files(_TEMPLATES) / "templates" / name).read_text(encoding="utf-8")


@cache
def _grid() -> str:
    """DataTables, which itables carries as a module, made a part of ours: its default export is `DataTable`."""
    bundle = (files("itables") / "html" / "dt_bundle.js").read_text(encoding="utf-8")
    if "</script" in bundle:
        raise ValueError("the bundle of itables cannot stand inside a page")
    head, _, tail = bundle.partition("export{")
    grid = re.search(r"([\w$]+) as default", tail)
    if grid is None:
        raise ValueError("the bundle of itables has no default export")
    return f"{head}\nconst DataTable = {grid[1]};\n"


def _json(data: Mapping[str, Any]) -> _Safe:
    """JSON that no HTML parser sees a tag in."""
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        packed = packed.replace(sign, f"\\u{ord(sign):04x}")
    return _Safe(packed)


def drawing(png: Path) -> Drawing:
    """The SVG beside a plot, as it is and with its greys turned for a dark page."""
    svg = png.with_suffix(".svg").read_text(encoding="utf-8")
    svg = re.sub(r"font: ([^;]*?)'DejaVu Sans'[^;\"]*", r"font: \1system-ui, sans-serif", svg)
    width_pt = float(re.search(r'width="([\d.]+)pt"', svg).group(1))  # type: ignore[union-attr]
    # Black is not written out where it is the default.
    dark = _GREY.sub(_turned, svg).replace("<svg ", f'<svg fill="#{_BLACK:02x}{_BLACK:02x}{_BLACK:02x}" ', 1)
    return Drawing(png.stem.replace("_", " ").capitalize(), _uri(svg), _uri(dark), round(width_pt * 96 / 72))


def _turned(grey: re.Match[str]) -> str:
    level = f"{round(_BLACK + int(grey[1], 16) / 255 * (_WHITE - _BLACK)):02x}"
    return f"#{level * 3}"


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def order(cell: str) -> str:
    """What a cell is sorted by: the number that it begins with, after all others where it is a dash."""
    found = re.match(r"-?\d+(\.\d+)?", cell)
    return found[0] if found else ("-1" if cell in ("–", "") else cell)


def shade(table: Table, column: int, cell: str) -> str:
    """The class of a cell: numbers to the right, percentages coloured where the table says they are some."""
    if column < table.names:
        return "name"
    if not table.shaded or not re.fullmatch(r"\d+(\.\d+)?", cell):
        return "number"
    return f"number shade-{min(_SHADES, round(float(cell) / 100 * _SHADES))}"
