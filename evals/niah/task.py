"""The grid of a needle test: lengths x depths x rounds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evals.common.chat import Chat
from evals.common.sources import Haystack, haystack
from evals.niah.prompt import Haystacks, assemble
from evals.niah.protocols import find_protocol
from evals.runs.task import Example, Question, Task
from shadowkv.common.errors import SkvError

_SLACK = 0.02  # a prompt is at most this much shorter than its length, to leave room for the answer


@dataclass(frozen=True)
class Niah(Task):
    """Settings of a needle test; lengths in tokens, depths in percent."""

    benchmark = "niah"

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    haystack_spec: str = "essays"
    protocol: str = "magic-number"
    rounds: int = 1
    seed: int = 0
    samples: int | None = None
    max_new_tokens: int = 16
    thinking: str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("max-new-tokens", self.max_new_tokens)):
            if value < 1:
                raise SkvError(f"--{name} must be at least 1, got {value}")
        if self.samples is not None and self.samples < 1:
            raise SkvError(f"--samples must be at least 1, got {self.samples}")
        find_protocol(self.protocol)

    @cached_property
    def _haystack(self) -> Haystack:
        return haystack(self.haystack_spec)

    def questions(self, tokenizer: Any) -> Sequence[Question]:
        haystacks = Haystacks(tokenizer, self._haystack.text, self.seed)
        self._made(tokenizer, haystacks, min(self.lengths), self.depths[0], 0)  # is the shortest one long enough?
        cells = [
            Question(self.protocol, length, cell_name(depth, round_))
            for round_ in range(self.rounds)
            for length in self.lengths
            for depth in self.depths
        ]
        return cells[: self.samples]

    def examples(self, tokenizer: Any, wanted: Collection[Question] | None = None) -> Iterator[Example]:
        haystacks = Haystacks(tokenizer, self._haystack.text, self.seed)
        asked = set(self.questions(tokenizer) if wanted is None else wanted)
        made = [
            self._made(tokenizer, haystacks, length, depth, round_)
            for round_ in range(self.rounds)
            for length in self.lengths
            for depth in self.depths
            if Question(self.protocol, length, cell_name(depth, round_)) in asked
        ]
        # In the order of their tokens, prompts walk through the tree of their common prefixes depth first. The engine
        # keeps one prompt, so every shared prefix is computed once: all depths of a haystack, and its shorter lengths.
        return iter(sorted(made, key=lambda example: example.input_ids))

    def _made(self, tokenizer: Any, haystacks: Haystacks, length: int, depth: float, round_: int) -> Example:
        protocol = find_protocol(self.protocol)
        budget = length - min(self.max_new_tokens, int(length * _SLACK))
        needle = protocol.needle(self.seed, length, depth, round_)
        chat = Chat(tokenizer, self.thinking)
        ids, at, asked_from = assemble(chat, tokenizer, haystacks, protocol.instruction, needle, budget, depth, round_)
        meta = {"depth": depth, "round": round_, "needle_token": at}
        return self._example(length, cell_name(depth, round_), ids, (needle.reference,), meta, asked_from)

    def _example(
        self,
        length: int,
        sample: str,
        ids: Sequence[int],
        references: tuple[str, ...],
        meta: dict[str, Any],
        asked_from: int | None = None,
    ) -> Example:
        return Example(
            benchmark=self.benchmark,
            task=self.protocol,
            length_tokens=length,
            sample=sample,
            input_ids=tuple(ids),
            references=references,
            max_new_tokens=self.max_new_tokens,
            meta=meta,
            asked_from=None if asked_from is None else lambda: asked_from,
        )

    def score(self, example: Example, prediction: str) -> float:
        protocol = find_protocol(self.protocol)
        return max(protocol.score(prediction, reference) for reference in example.references)

    def chat_answer_tokens(self) -> Collection[int]:
        return (self.max_new_tokens,)

    def config(self) -> dict[str, Any]:
        return {"protocol": self.protocol, "seed": self.seed, "max_new_tokens": self.max_new_tokens}

    def selection(self) -> dict[str, Any]:
        return {"lengths": self.lengths, "depths": self.depths, "rounds": self.rounds, "samples": self.samples}

    def sources(self) -> dict[str, Any]:
        source, protocol = self._haystack, find_protocol(self.protocol)
        return {
            "haystack": {"name": source.name, "version": source.version, "sha256": source.sha256},
            "protocol": {"name": protocol.name, "scoring": protocol.scoring},
        }

    def needs(self) -> tuple[str, ...]:
        return ("essays",) if "essays" in (self.haystack_spec, find_protocol(self.protocol).needs) else ()

    def notes(self) -> list[str]:
        if self._haystack.comparable:
            return []
        return [f"haystack {self._haystack.name}: not comparable with published scores"]


def cell_name(depth: float, round_: int) -> str:
    """The name of a prompt within its length."""
    return f"depth={depth:g},round={round_}"


def parse_depths(text: str) -> tuple[float, ...]:
    """Read `5` (that many, evenly from 0 to 100 percent) or a list such as `0,25,100`; `50,` is a list of one."""
    items = [part.strip() for part in text.split(",")]
    if len(items) == 1:
        if not items[0].isdecimal() or int(items[0]) < 1:
            raise SkvError(f"'{text}' is not a number of depths; write 5, or a list of percentages such as 0,50,100")
        count = int(items[0])
        return (50.0,) if count == 1 else tuple(round(100 * i / (count - 1), 2) for i in range(count))
    depths = []
    for item in filter(None, items):
        try:
            depth = float(item)
        except ValueError:
            raise SkvError(f"'{item}' is not a depth; depths are percentages from 0 to 100") from None
        if not 0 <= depth <= 100:
            raise SkvError(f"depth {item} is outside 0 to 100 percent")
        depths.append(depth)
    return tuple(dict.fromkeys(depths))
