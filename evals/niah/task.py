"""The grid of a needle test: lengths x depths x rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evals.niah.prompt import Haystacks, assemble
from evals.niah.protocols import find_protocol
from evals.sources import Haystack, haystack
from evals.task import Example, Task
from shadowkv.errors import SkvError

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

    def examples(self, tokenizer: Any) -> Sequence[Example]:
        protocol, source = find_protocol(self.protocol), self._haystack
        haystacks = Haystacks(tokenizer, source.text, self.seed)
        made: list[Example] = []
        for round_ in range(self.rounds):
            for length in self.lengths:
                budget = length - min(self.max_new_tokens, int(length * _SLACK))
                for depth in self.depths:
                    if self.samples is not None and len(made) == self.samples:
                        return made
                    needle = protocol.needle(self.seed, length, depth, round_)
                    ids, at = assemble(tokenizer, haystacks, protocol.instruction, needle, budget, depth, round_)
                    made.append(
                        Example(
                            benchmark=self.benchmark,
                            task=self.protocol,
                            length_tokens=length,
                            sample=f"depth={depth:g},round={round_}",
                            input_ids=ids,
                            references=(needle.reference,),
                            max_new_tokens=self.max_new_tokens,
                            meta={"depth": depth, "round": round_, "needle_token": at},
                        )
                    )
        return made

    def score(self, prediction: str, references: Sequence[str]) -> float:
        protocol = find_protocol(self.protocol)
        return max(protocol.score(prediction, reference) for reference in references)

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

    def notes(self) -> list[str]:
        if self._haystack.comparable:
            return []
        return [f"haystack {self._haystack.name}: not comparable with published scores"]


def parse_lengths(text: str, context_tokens: int) -> tuple[int, ...]:
    """Read `1k,2k,4096`; k is 1024 tokens. Raises `SkvError` on nonsense and on lengths beyond the context."""
    lengths = []
    for item in filter(None, (part.strip().lower() for part in text.split(","))):
        digits, factor = (item[:-1], 1024) if item.endswith("k") else (item, 1)
        digits, factor = (item[:-1], 1024 * 1024) if item.endswith("m") else (digits, factor)
        if not digits.isdecimal() or int(digits) == 0:
            raise SkvError(f"'{item}' is not a length; write tokens as 4096 or 4k (k = 1024)")
        tokens = int(digits) * factor
        if tokens > context_tokens:
            raise SkvError(f"length {item} ({tokens} tokens) is beyond this model's context of {context_tokens} tokens")
        lengths.append(tokens)
    if not lengths:
        raise SkvError("no lengths given; for example --lengths 1k,2k,4k")
    return tuple(dict.fromkeys(lengths))


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
