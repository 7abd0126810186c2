"""Colour, marker and line of every method: the same in every figure, whatever else is drawn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.colors import to_hex, to_rgb

# Okabe and Ito's colours, which colour-blind readers can tell apart, and a marker for each: print has no colours.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999933")
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", ":", "-.")
_FIRST = ("full", "shadowkv", "quest")  # the most distinct ones for those that are drawn most
_FADING = 0.65  # of a colour that stays with every further setting of a method


class Look(NamedTuple):
    """How one label is drawn."""

    colour: str
    marker: str
    line: str
    hatch: str  # of bars, which have no marker: empty for the first eight methods

    @property
    def style(self) -> dict[str, Any]:
        """Of a line with markers, as matplotlib names it."""
        return {"color": self.colour, "marker": self.marker, "ls": self.line}


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """By label. A method has its own colour and marker; further settings of it are paler and have other lines."""
    from shadowkv.contract.registry import methods  # which imports torch, and who only reads runs draws nothing

    order = [*_FIRST, *(name for name in methods() if name not in _FIRST)]
    found: dict[str, Look] = {}
    drawn = Counter[str]()
    for label in dict.fromkeys(labels):
        name = re.split(r"\W", label, maxsplit=1)[0]  # full@hf and full+minference are kinds of full
        if name not in order:  # a folder may be older than the methods there are
            order.append(name)
        place, count = order.index(name), drawn[name]
        drawn[name] += 1
        turn, colour = divmod(place, len(COLOURS))
        marker = _MARKERS[(place + turn) % len(_MARKERS)]  # colours repeat, pairs do not
        found[label] = Look(_faded(COLOURS[colour], count), marker, _LINES[count % len(_LINES)], "xx" * turn)
    return found


def _faded(colour: str, times: int) -> str:
    share = _FADING**times
    return to_hex([share * channel + 1 - share for channel in to_rgb(colour)])
