"""One layer's keys before RoPE as low-rank factors, in the model's type or in 8 bits. ShadowKV, section 3.1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from itertools import starmap

import torch
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.tensors import low_rank, ops
from shadowkv.tensors.buffers import TokenBuffer
from shadowkv.tensors.stacking import Stackable
from shadowkv.tensors.stored import CODINGS

FACTOR_CODINGS = ("native", "bf16", "int8")


class KeyFactors(Stackable):
    """key_t ~ coefficients_t @ vectors, for the W channels of all heads at once.

    In 8 bits the directions are first brought to equal size (their size goes to the vectors), so that the weak ones
    are not rounded away beside the strong ones; then each token has a scale of its own.
    """

    def __init__(self, directions: Tensor, coefficients: Tensor, coding: str, dtype: torch.dtype) -> None:
        """directions [B,r,W] fp32; coefficients [B,n,r] fp32, as they project."""
        self._coding = coding
        self._vectors = directions.to(dtype)
        self._projector: Tensor | None = None  # what projects, where it is not what rebuilds
        if coding == "int8":
            # Of a prompt too short for any chunk nothing is known, and all directions count alike.
            batch, tokens, rank = coefficients.shape
            measured = coefficients if tokens else coefficients.new_ones(batch, 1, rank)
            spread = measured.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
            self._vectors = (directions * spread.mT).to(dtype)
            self._projector = (directions / spread.mT).to(dtype)
            coefficients = coefficients / spread
        parts = CODINGS[coding].encode(coefficients.to(dtype) if coding == "native" else coefficients)
        self._parts = tuple(TokenBuffer(part, axis=1) for part in parts)

    @classmethod
    def of(
        cls,
        pre_rope: Callable[[int, int], Tensor],
        tokens: int,
        context_tokens: int,
        rank: int,
        energy: float,
        coding: str,
        dtype: torch.dtype,
        made_up: bool = False,
    ) -> KeyFactors:
        """Factors of the first `context_tokens` keys of a prompt; the directions are of all its `tokens`.

        pre_rope(first, end): some of its keys, [B,n,W] fp32, made twice for every token. made_up: they mean nothing,
        and any directions of that rank do.
        """
        if made_up and not energy:
            directions = low_rank.arbitrary(pre_rope(0, 0), rank)
        else:
            directions = low_rank.fit(starmap(pre_rope, _spans(tokens)), rank, energy)
        blocks = [low_rank.project(pre_rope(*span), directions) for span in _spans(context_tokens)]
        return cls(directions, torch.cat(blocks, dim=1), coding, dtype)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The coefficients as they are kept: [B,n,r] and, in 8 bits, a scale [B,n,1]."""
        return tuple(part.view for part in self._parts)

    @property
    def vectors(self) -> Tensor:
        """What rebuilds, [B,r,W]."""
        return self._vectors

    def emptied(self) -> KeyFactors:
        """The same directions without any token."""
        emptied = copy(self)
        emptied._parts = tuple(TokenBuffer(part[:, :0], axis=1) for part in self.parts)
        return emptied

    def encode(self, pre_rope: Tensor, rows: slice | list[int] = slice(None)) -> tuple[Tensor, ...]:
        """The parts of more tokens of these rows on the same directions. pre_rope [b,T,W] fp32."""
        vectors = self._vectors if self._projector is None else self._projector
        coefficients = low_rank.project(pre_rope, vectors[rows])
        dtype = self._vectors.dtype if self._coding == "native" else torch.float32
        return CODINGS[self._coding].encode(coefficients.to(dtype))

    def append(self, pre_rope: Tensor) -> None:
        """Add tokens, projected on the directions that there are. pre_rope [B,T,W] fp32."""
        for held, new in zip(self._parts, self.encode(pre_rope), strict=True):
            held.append(new)

    @ranged("rebuild")
    def rebuild(self, index: Tensor) -> Tensor:
        """Pre-RoPE keys of the chosen tokens. index [B,H,s] -> [B,H,s,D]."""
        rows = CODINGS[self._coding].decode(*(ops.gather_shared(part, index) for part in self.parts))
        return ops.expand(rows.to(self._vectors.dtype), self._vectors)

    def nbytes(self) -> int:
        directions = [x.nbytes for x in (self._vectors, self._projector) if x is not None]
        return sum(part.nbytes() for part in self._parts) + sum(directions)


def _spans(tokens: int) -> Iterator[tuple[int, int]]:
    """Where blocks of these tokens begin and end; an empty one of none."""
    for first in range(0, max(tokens, 1), low_rank.BLOCK_TOKENS):
        yield first, min(first + low_rank.BLOCK_TOKENS, tokens)
