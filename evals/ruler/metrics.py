"""RULER's scores of one prediction, in [0, 1]."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]

_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references contained in the prediction, whatever their case (NVIDIA's metric of record)."""
    said = _cleaned(prediction).lower()
    return sum(reference.lower() in said for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction contains any reference, whatever its case (NVIDIA's metric of the two QA tasks)."""
    said = _cleaned(prediction).lower()
    return float(any(reference.lower() in said for reference in references))


def shadowkv_needle(prediction: str, references: Sequence[str]) -> float:
    """ShadowKV's needle_score: the normalised answer starts with the reference or has it among its words."""
    said, wanted = _squad(_without_markers(prediction)), _squad(references[0])
    return float(said.startswith(wanted) or wanted in said.split())


def shadowkv_numbers(prediction: str, references: Sequence[str]) -> float:
    """ShadowKV's multi_number: share of the references among the numbers of the normalised answer."""
    said = re.findall(r"\d+", _squad(prediction))
    return sum(reference in said for reference in references) / len(references)


def shadowkv_words(prediction: str, references: Sequence[str]) -> float:
    """ShadowKV's multi_words: share of the references among the answer's words, in lower case."""
    said = re.findall(r"\b\w+\b", prediction.lower())
    return sum(reference.lower() in said for reference in references) / len(references)


def shadowkv_part(prediction: str, references: Sequence[str]) -> float:
    """ShadowKV's string_match_part: any reference in the answer, or the answer in any reference.

    Its authors' version gives an empty answer 1, since the empty text is part of every other. Here that is 0: an
    answer that was never given is not right. This is the one deviation from their metrics.
    """
    said = _without_markers(prediction).lower()
    lowered = [reference.lower() for reference in references]
    return float(bool(said) and any(reference in said or said in reference for reference in lowered))


def _cleaned(prediction: str) -> str:
    return _CONTROL.sub("\n", prediction.strip()).strip()


def _without_markers(prediction: str) -> str:
    text = prediction.strip()
    for marker in ("<|eot_id|>", "</s>", "</s", "</"):
        text = text.replace(marker, "")
    return _CONTROL.sub("\n", text).strip()


def _squad(text: str) -> str:
    """SQuAD's normal form: lower case without punctuation, articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
