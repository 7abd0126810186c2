"""Multi-turn needle test: one text with several needles, asked for one after the other in the same cache.

A method that drops what the first question does not need fails from the second turn on (SnapKV, StreamingLLM in the
ShadowKV paper's multi-turn test; the public implementation closest to it is xKV's niah_multiturn). Answers stay in
the cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evals.common.chat import Chat
from evals.common.seeding import seeded
from evals.niah.prompt import Haystacks, assemble_many, follow_up
from evals.niah.protocols import find_protocol
from evals.niah.task import Niah, cell_name
from evals.runs.task import Example, Question
from shadowkv.common.errors import SkvError


@dataclass(frozen=True)
class MultiTurnNiah(Niah):
    """turns: questions per text · first_query_in_prefill: whether the prompt, and so a method that judges by its last
    queries, contains the first question. The needle of turn 1 lies at the depth of the grid, the others at depths drawn
    from the grid's (or evenly, where it has too few)."""

    turns: int = 5
    first_query_in_prefill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns < 2:
            raise SkvError(f"a conversation needs --turns of at least 2, got {self.turns}")

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        texts = super().questions(tokenizer)
        return [question for of_text in texts for question in self._all_turns(of_text)]

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        asked = self.questions(tokenizer) if wanted is None else wanted
        return super().examples(tokenizer, {self.prompt_of(question) for question in asked})

    def prompt_of(self, question: Question) -> Question:
        return question._replace(sample=question.sample.rpartition(",turn=")[0])

    def _all_turns(self, text: Question) -> list[Question]:
        return [text._replace(sample=f"{text.sample},turn={turn}") for turn in range(1, self.turns + 1)]

    def _made(self, tokenizer: Any, haystacks: Haystacks, length: int, depth: float, round_: int) -> Example:
        protocol = find_protocol(self.protocol)
        needles = protocol.needles(self.seed, length, depth, round_, self.turns)
        depths = self._depths(length, depth, round_)
        chat = Chat(tokenizer, self.thinking)
        later = [follow_up(chat, tokenizer, needle) for needle in needles[1:]]
        budget = length - self.turns * self.max_new_tokens - sum(map(len, later))
        context, asked = assemble_many(
            chat, tokenizer, haystacks, protocol.instruction, needles, depths, budget, round_
        )
        text = cell_name(depth, round_)
        fed = [[*context, *asked], *later] if self.first_query_in_prefill else [context, asked, *later]
        turns = []
        for turn, (ids, needle, own) in enumerate(zip(fed[-self.turns :], needles, depths, strict=True), 1):
            meta = {"depth": own, "round": round_, "turn": turn}
            turns.append(self._example(length, f"{text},turn={turn}", ids, (needle.reference,), meta))
        if self.first_query_in_prefill:
            return replace(turns[0], later=tuple(turns[1:]), asked_from=lambda: len(context))
        unasked = self._example(length, text, context, (), {"depth": depth, "round": round_})
        return replace(unasked, later=tuple(turns))

    def _depths(self, length: int, depth: float, round_: int) -> list[float]:
        """Depth of each turn's needle, in percent, no two the same."""
        others = [other for other in self.depths if other != depth]
        if len(others) < self.turns - 1:
            others = [d for i in range(2 * self.turns) if (d := round(100 * (i + 0.5) / (2 * self.turns), 2)) != depth]
        return [depth, *seeded("turns", self.seed, length, depth, round_).sample(others, self.turns - 1)]

    def config(self) -> dict[str, Any]:
        turns = {"turns": self.turns, "first_query_in_prefill": self.first_query_in_prefill}
        return {**super().config(), **turns, "grid": list(self.depths)}
