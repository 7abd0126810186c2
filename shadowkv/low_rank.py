"""Rank-r approximation of keys before RoPE, and of values, by eigendecomposition of their Gram matrix.

The Gram matrix is W x W however long the prompt is, and a sum over its tokens: no SVD of [S, W] is ever taken, nor does
the prompt have to be there as a whole. Keys are centred first: an
affine fit of rank r is never worse than a linear one, and models with a bias on the key projection (Qwen2) would
otherwise spend the first direction on their mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from shadowkv import ops
from shadowkv.ranges import ranged

BLOCK_TOKENS = 8192  # what is made of a prompt in fp32 at a time


class Basis(NamedTuple):
    """x ~ coefficients @ vectors + mean, for x [B,n,W]."""

    vectors: Tensor  # [B,r,W] orthonormal rows
    mean: Tensor  # [B,1,W]

    def project(self, x: Tensor) -> Tensor:
        """Coefficients of x. [B,n,W] -> [B,n,r], fp32."""
        return (x.float() - self.mean.float()) @ self.vectors.float().mT


def fit(blocks: Iterable[Tensor], rank: int, energy: float = 0.0) -> Basis:
    """The best basis of `rank` directions or, given `energy`, of as many as hold that share of the squared norm.

    blocks: x [B,n,W], in pieces along n. Products are accumulated in fp64, so that small singular values survive being
    squared. Directions beyond the rank of x are arbitrary but orthonormal.
    """
    pieces = iter(blocks)
    first = next(pieces).double()
    # What is squared stays small around a point near the mean, which is known only at the end.
    origin = first.mean(dim=1, keepdim=True)
    total, gram, tokens = torch.zeros_like(origin), torch.zeros_like(origin.mT @ origin), 0
    for block in chain([first], pieces):
        shifted = block.double() - origin
        total += shifted.sum(dim=1, keepdim=True)
        gram += shifted.mT @ shifted
        tokens += shifted.shape[1]
    offset = total / tokens
    gram -= tokens * offset.mT @ offset
    values, vectors = torch.linalg.eigh(gram)
    if energy:
        rank = _rank_for(values.flip(-1), energy)
    return Basis(vectors.flip(-1)[..., :rank].mT.float().contiguous(), (origin + offset).float())


def _rank_for(descending: Tensor, energy: float) -> int:
    """The smallest rank whose directions hold `energy` of the total, in every row of the batch."""
    held = descending.clamp(min=0).cumsum(dim=-1)
    short = held < energy * held[..., -1:]
    return int(short.sum(dim=-1).max()) + 1 if bool(short.any()) else 1


class SharedFactors(NamedTuple):
    """Keys or values of a group of layers: x ~ coefficients @ vectors + mean, layer after layer in the last axis."""

    coefficients: Tensor  # [B,n,r], shared by the layers
    vectors: Tensor  # [B,r,layers*W]
    mean: Tensor  # [B,1,layers*W]
    layers: int

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.coefficients, self.vectors, self.mean))

    @ranged("rebuild")
    def rebuild(self, place: int, heads: int) -> Tensor:
        """What the layer at `place` of the group had, [B,H,n,D]."""
        vectors, mean = self._of(place, heads)
        return self.coefficients[:, None] @ vectors + mean

    @ranged("rebuild")
    def rebuild_at(self, place: int, index: Tensor) -> Tensor:
        """Chosen tokens of what the layer at `place` had. index [B,H,s] -> [B,H,s,D]."""
        own = self._columns(place)
        return ops.rebuild(self.coefficients, self.vectors[:, :, own], self.mean[:, :, own], index)

    @ranged("attention")
    def weigh(self, weights: Tensor, place: int) -> Tensor:
        """weights @ rebuild(place), without rebuilding. weights [B,H,m,n] -> [B,H,m,D]."""
        vectors, mean = self._of(place, weights.shape[1])
        return (weights @ self.coefficients[:, None]) @ vectors + weights.sum(dim=-1, keepdim=True) * mean

    def _of(self, place: int, heads: int) -> tuple[Tensor, Tensor]:
        """Vectors [B,H,r,D] and mean [B,H,1,D] of one layer."""
        own = self._columns(place)
        vectors, mean = (x[:, :, own].unflatten(2, (heads, -1)).transpose(1, 2) for x in (self.vectors, self.mean))
        return vectors, mean

    def _columns(self, place: int) -> slice:
        width = self.vectors.shape[2] // self.layers
        return slice(place * width, (place + 1) * width)


def share(layers: list[Tensor], rank: int, dtype: torch.dtype) -> SharedFactors:
    """The best factors of the layers side by side. layers [B,H,n,D] each."""
    side_by_side = torch.cat([x.float().transpose(1, 2).flatten(2) for x in layers], dim=2)
    basis = fit(side_by_side.split(BLOCK_TOKENS, dim=1), rank)
    coefficients = basis.project(side_by_side).to(dtype)
    return SharedFactors(coefficients, basis.vectors.to(dtype), basis.mean.to(dtype), len(layers))
