"""One forced continuation under one method: what a run folder keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from evals.common.asking.question import IN_PROMPT
from evals.runs.results import OfPrompt


@dataclass(frozen=True)
class ForcedRecord(OfPrompt):
    """Distances after each token fed, in order; none unless `status` is ok.

    They are those of `evals.runs.forced.distributions.Distances`.
    """

    FILE: ClassVar[str] = "forced.jsonl"

    benchmark: str
    task: str
    length: int
    sample: str
    method: str
    status: str  # ok, oom or error
    error: str | None
    prompt_tokens: int  # held before the first token is fed
    reused_tokens: int
    kl: list[float]
    nll: list[float]
    full_nll: list[float]
    top1: list[int]
    top5: list[int]
    rank: list[int]
    compared: str  # whole distributions, or the most likely tokens and the rest
    prefill_s: float
    build_s: float  # making the cache; with a question after the context, feeding it too
    force_s: float
    device_bytes: int
    host_bytes: int
    prompt_sha256: str  # of the prompt and what is fed after it
    meta: dict[str, Any] = field(default_factory=dict)
    attended_tokens: float | None = None
    bus_bytes: int | None = None
    question: str = IN_PROMPT  # where it stands

    @property
    def final(self) -> bool:
        return self.status == "ok"

    @property
    def shown(self) -> str:
        """What a line of progress says of it."""
        return f"KL {self.mean_kl:.2g}" if self.final else self.status

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return float(np.mean(self.kl))

    @property
    def more_nll(self) -> float:
        """Nats per token beyond full attention's."""
        return float(np.mean(self.nll) - np.mean(self.full_nll))
