"""LongBench's scores of one prediction against one answer, in [0, 1], as its authors compute them.

Some of what they compute is peculiar, and kept: see `classification` and `rouge_l`.
"""

from __future__ import annotations

import difflib
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from shadowkv.common.errors import SkvError

# prediction, answer, all classes of the task (empty for most) -> score
Metric = Callable[[str, str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠"
    "｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, in SQuAD's normal form."""
    return _f1(_normal_words(prediction), _normal_words(answer))


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of jieba's words, without punctuation and spaces."""

    def words(text: str) -> list[str]:
        cut = ("".join(word.lower().translate(_ALL_PUNCTUATION).split()) for word in _segmented(text))
        return [word for word in cut if word]

    return _f1(words(prediction), words(answer))


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F of the PyPI package rouge 1.0.1's summary-level ROUGE-L; 0 where that package fails, as on an empty text.

    It splits at full stops, unites the common subsequences and counts unique words, so it is not what other
    implementations call ROUGE-L.
    """
    from rouge import Rouge

    try:
        score: float = Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError):  # an empty hypothesis or reference; a text too long for its recursion
        return 0.0
    return score


def rouge_l_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same over jieba's words."""
    return rouge_l(" ".join(_segmented(prediction)), " ".join(_segmented(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes named, if the right one is among them.

    A class whose name is part of the answer's does not count as named. The original drops those from the list that it
    is walking through, so of two in a row the second one stays; so does it here.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] in answer and named[place] != answer:
            named.remove(named[place])
        place += 1
    return 1.0 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the answer's, `Paragraph 12`."""
    return _share_of_numbers(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same for `段落12`."""
    return _share_of_numbers(prediction, re.findall(r"段落(\d+)", answer)[0])


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the answer."""
    return _share_of_numbers(prediction, answer)


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line that has no sign of a comment or of Markdown.

    The original calls fuzzywuzzy, which without its optional C extension is difflib's ratio in whole percents.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def first_line(prediction: str) -> str:
    """What the few-shot tasks judge: models go on with more examples."""
    return prediction.lstrip("\n").split("\n")[0]


def needs(metric: Metric) -> str | None:
    """Why a metric cannot be computed here, or None."""
    import importlib.util

    if metric in (qa_f1_zh, rouge_l_zh) and importlib.util.find_spec("jieba") is None:
        return "needs jieba to cut Chinese into words: pip install 'skv[zh]'"
    return None


def _normal_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return sum(number == wanted for number in numbers) / len(numbers) if numbers else 0.0


def _segmented(text: str) -> list[str]:
    try:
        import jieba  # type: ignore[import-untyped]
    except ImportError:
        raise SkvError("Chinese tasks need jieba: pip install 'skv[zh]'") from None
    jieba.setLogLevel(logging.WARNING)
    return list(jieba.cut(text, cut_all=False))
