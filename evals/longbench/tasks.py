"""The 21 tasks: what is judged how, and the checksum of the official prompt template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from evals.longbench import metrics
from evals.longbench.metrics import Metric
from shadowkv.common.errors import SkvError


@dataclass(frozen=True)
class Spec:
    """One task."""

    name: str
    category: str
    language: str  # en, zh or code
    metric: Metric
    max_new_tokens: int
    template_sha256_16: str
    in_e: bool = False  # whether LongBench-E has it
    chat: bool = True  # whether the prompt goes into the chat template
    first_line: bool = False  # whether only the first line of an answer counts

    def check(self, answers: Sequence[str], classes: Sequence[str], where: str) -> None:
        """Raise `SkvError` if answers cannot be judged: without any classes, every right answer would score 0.

        An answer that is none of the classes is the authors' affair: they give it 0 as well.
        """
        if self.metric is metrics.classification and not classes:
            raise SkvError(f"{where}: 'all_classes' is missing or empty, which {self.name} is judged by")
        forms: dict[Metric, str] = {metrics.retrieval: "Paragraph ", metrics.retrieval_zh: "段落"}
        numbered = forms.get(self.metric)
        if numbered and not all(re.search(rf"{numbered}\d", answer) for answer in answers):
            raise SkvError(f"{where}: an answer of {self.name} is not of the form '{numbered}12'")


_SINGLE, _MULTI, _SUMMARY = "single-doc QA", "multi-doc QA", "summarization"
_FEW_SHOT, _SYNTHETIC, CODE = "few-shot", "synthetic", "code"

TASKS: MappingProxyType[str, Spec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            Spec("narrativeqa", _SINGLE, "en", metrics.qa_f1, 128, "aada7ed24b06abac"),
            Spec("qasper", _SINGLE, "en", metrics.qa_f1, 128, "0fbdd123fe7f83d6", in_e=True),
            Spec("multifieldqa_en", _SINGLE, "en", metrics.qa_f1, 64, "20b4666a2de8a1f7", in_e=True),
            Spec("multifieldqa_zh", _SINGLE, "zh", metrics.qa_f1_zh, 64, "344b3a4e557cd547"),
            Spec("hotpotqa", _MULTI, "en", metrics.qa_f1, 32, "9ec4ae308865bd0c", in_e=True),
            Spec("2wikimqa", _MULTI, "en", metrics.qa_f1, 32, "9ec4ae308865bd0c", in_e=True),
            Spec("musique", _MULTI, "en", metrics.qa_f1, 32, "9ec4ae308865bd0c"),
            Spec("dureader", _MULTI, "zh", metrics.rouge_l_zh, 128, "ae53329f51b17908"),
            Spec("gov_report", _SUMMARY, "en", metrics.rouge_l, 512, "91c25d585b189ced", in_e=True),
            Spec("qmsum", _SUMMARY, "en", metrics.rouge_l, 512, "dca23b678fe0183b"),
            Spec("multi_news", _SUMMARY, "en", metrics.rouge_l, 512, "2af3f28c40b902e6", in_e=True),
            Spec("vcsum", _SUMMARY, "zh", metrics.rouge_l_zh, 512, "3e5d8241bc9b512e"),
            Spec(
                "trec", _FEW_SHOT, "en", metrics.classification, 64, "0eff8bebdba99d91",
                in_e=True, chat=False, first_line=True,
            ),
            Spec(
                "triviaqa", _FEW_SHOT, "en", metrics.qa_f1, 32, "00a802e6377e72fc",
                in_e=True, chat=False, first_line=True,
            ),
            Spec(
                "samsum", _FEW_SHOT, "en", metrics.rouge_l, 128, "a68d884234907eef",
                in_e=True, chat=False, first_line=True,
            ),
            Spec(
                "lsht", _FEW_SHOT, "zh", metrics.classification, 64, "f3edabdf7fae53d6", chat=False, first_line=True
            ),
            Spec("passage_count", _SYNTHETIC, "en", metrics.count, 32, "986550b6c61009c6", in_e=True),
            Spec("passage_retrieval_en", _SYNTHETIC, "en", metrics.retrieval, 32, "39b96b7fa52bdd2a", in_e=True),
            Spec("passage_retrieval_zh", _SYNTHETIC, "zh", metrics.retrieval_zh, 32, "c1e2346e245eb365"),
            Spec("lcc", CODE, "code", metrics.code_similarity, 64, "6a1f24cf0bb83cd9", in_e=True, chat=False),
            Spec("repobench-p", CODE, "code", metrics.code_similarity, 64, "ee9ec182ea5ffeb7", in_e=True, chat=False),
        )
    }
)  # fmt: skip

CATEGORIES = (_SINGLE, _MULTI, _SUMMARY, _FEW_SHOT, _SYNTHETIC, CODE)
SIXTEEN = tuple(spec.name for spec in TASKS.values() if spec.language != "zh")  # what KV-cache papers average over
E_TASKS = tuple(spec.name for spec in TASKS.values() if spec.in_e)


def bucket(words: int) -> str:
    """LongBench-E's length class of a row, by its `length` field, which counts words, not tokens."""
    return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"
