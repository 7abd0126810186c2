"""The thirteen tasks with their parameters (RULER, appendix B), and the two ways to run them."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from evals.ruler import metrics
from evals.ruler.families.answering import QuestionAnswering
from evals.ruler.families.counting import CommonWords, FrequentWords
from evals.ruler.families.family import Family
from evals.ruler.families.niah import Niah
from evals.ruler.families.tracking import VariableTracking
from evals.ruler.metrics import Metric
from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean

EFFECTIVE_SCORE = 85.6  # percent, Llama-2-7B's at 4K: a model's effective length is the longest one that exceeds it

TASKS: MappingProxyType[str, Family] = MappingProxyType(
    {
        "niah_single_1": Niah(haystack="noise"),
        "niah_single_2": Niah(haystack="essay"),
        "niah_single_3": Niah(haystack="essay", value_kind="uuids"),
        "niah_multikey_1": Niah(haystack="essay", keys=4),
        "niah_multikey_2": Niah(haystack="needle"),
        "niah_multikey_3": Niah(haystack="needle", key_kind="uuids", value_kind="uuids"),
        "niah_multivalue": Niah(haystack="essay", values=4),
        "niah_multiquery": Niah(haystack="essay", queries=4),
        "vt": VariableTracking(),
        "cwe": CommonWords(),
        "fwe": FrequentWords(),
        "qa_1": QuestionAnswering(dataset="squad"),
        "qa_2": QuestionAnswering(dataset="hotpotqa"),
    }
)


@dataclass(frozen=True)
class Profile:
    """Which tasks, how many samples of each, and which metric judges a task."""

    name: str
    tasks: tuple[str, ...]
    samples: int
    metrics: MappingProxyType[str, Metric]


_NVIDIA: dict[str, Metric] = {
    task: metrics.string_match_part if task.startswith("qa_") else metrics.string_match_all for task in TASKS
}
_SHADOWKV: dict[str, Metric] = {
    **dict.fromkeys((t for t in TASKS if t.startswith("niah_")), metrics.shadowkv_needle),
    "niah_multivalue": metrics.shadowkv_numbers,
    "niah_multiquery": metrics.shadowkv_numbers,
    **dict.fromkeys(("vt", "cwe", "fwe"), metrics.shadowkv_words),
    **dict.fromkeys(("qa_1", "qa_2"), metrics.shadowkv_part),
}
PROFILES: MappingProxyType[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile("nvidia", tuple(TASKS), 500, MappingProxyType(_NVIDIA)),
            Profile(
                "shadowkv",
                tuple(task for task in TASKS if task not in ("niah_multikey_3", "cwe")),
                96,
                MappingProxyType(_SHADOWKV),
            ),
        )
    }
)


def find_profile(name: str) -> Profile:
    """The profile called `name`."""
    if name not in PROFILES:
        raise SkvError(f"unknown profile '{name}'{did_you_mean(name, PROFILES)}; profiles: {', '.join(PROFILES)}")
    return PROFILES[name]
