"""Which settings of a method a line may join: those that differ in one size and in nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from evals.common.asking.question import method_of
from evals.common.grouping import grouped

# What is swept to trade bytes for score. A setting that could be joined along several is, along the first of them.
_SWEPT = ("budget", "rank", "rank_k", "rank_v", "bits", "retrieval")


def curves(labels: Sequence[str]) -> dict[str, list[str]]:
    """Labels by line, each once. A line is named by what its settings share and what differs, a lone one by itself."""
    line_of = {label: label for label in labels}
    for parameter in _SWEPT:
        lone = [label for label, line in line_of.items() if line == label]
        for shared, alike in grouped(lone, partial(_without, parameter)).items():
            if len(alike) > 1:
                line_of |= dict.fromkeys(alike, f"{shared} by {parameter}")
    return grouped(line_of, line_of.__getitem__)


def _without(parameter: str, label: str) -> str:
    """`shadowkv:rank=64+minference` of `shadowkv:budget=256,rank=64+minference`."""
    method = method_of(label)
    rest = re.sub(rf"(?<=[:,]){parameter}=[^,+]*,?", "", method)
    return re.sub(r"[:,](?=\+|$)", "", rest) + label.removeprefix(method)
