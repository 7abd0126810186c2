"""What an engine keeps of the latest prompt: the snapshot that methods replay, and what the next prompt shares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shadowkv.contract.method import OBSERVED_QUERIES
from shadowkv.contract.sparse_prefill import SparsePrefill
from shadowkv.engine.recording import Recording


@dataclass(eq=False)
class Prefill:
    """The prefill of one batch of equally long prompts; valid until the engine's next one of its kind."""

    recording: Recording
    logits: Tensor  # [B,vocab] of the last position: the first new token is always the prefill's own
    prompt_tokens: int
    reused_tokens: int
    sparse: SparsePrefill | None
    valid: bool = True


@dataclass(eq=False)
class Kept:
    """What stays of the latest prefill of one kind, dense or sparse."""

    recording: Recording | None = None
    ids: Tensor | None = None  # those that the recording holds; None while it holds nothing that can be reused
    prefill: Prefill | None = None

    def shared_tokens(self, input_ids: Tensor) -> int | None:
        """How many tokens [B,S] share with what is held; None where nothing of it can be used."""
        if self.recording is None or self.ids is None or self.ids.shape[0] != input_ids.shape[0]:
            return None
        # Methods may ask for the last queries, so at least those are computed anew.
        limit = min(self.ids.shape[1], input_ids.shape[1] - OBSERVED_QUERIES)
        if limit <= 0:
            return None
        same = (self.ids[:, :limit] == input_ids[:, :limit]).all(dim=0)
        return limit if bool(same.all()) else int(same.int().argmin())
