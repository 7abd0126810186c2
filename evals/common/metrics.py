"""Scores of one prediction, in [0, 1]."""

from __future__ import annotations

import re

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def contains_number(prediction: str, number: str) -> float:
    """1 if the prediction contains exactly this number, also written with thousands separators.

    A longer number that merely contains its digits does not count.
    """
    plain = _THOUSANDS.sub("", prediction)
    return float(re.search(rf"(?<!\d){re.escape(number)}(?!\d)", plain) is not None)


def contains_text(prediction: str, text: str) -> float:
    """1 if the prediction contains the text, whatever its case and spacing."""
    return float(" ".join(text.lower().split()) in " ".join(prediction.lower().split()))
