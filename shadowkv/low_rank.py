"""Rank-r approximation of keys before RoPE, and of values, by eigendecomposition of their Gram matrix.

The Gram matrix is W x W however long the prompt is, and a sum over its tokens: no SVD of [S, W] is ever taken, nor does
the prompt have to be there as a whole. Whether the fit is affine (around the mean of the tokens) or linear is for the
method to say: the affine one has the smaller error as a matrix, but takes the norm of short rows away, such as the
first token's value, which much attention goes to.
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


def fit(blocks: Iterable[Tensor], rank: int, energy: float = 0.0, centred: bool = True) -> Basis:
    """The best basis of `rank` directions or, given `energy`, of as many as hold that share of the squared norm.

    centred: around the mean of the tokens; otherwise around zero, which is then the mean of the basis.
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
    mean = origin + offset
    if not centred:
        gram += tokens * mean.mT @ mean
        mean = torch.zeros_like(mean)
    values, vectors = torch.linalg.eigh(gram)
    if energy:
        rank = _rank_for(values.flip(-1), energy)
    return Basis(vectors.flip(-1)[..., :rank].mT.float().contiguous(), mean.float())


def _rank_for(descending: Tensor, energy: float) -> int:
    """The smallest rank whose directions hold `energy` of the total, in every row of the batch."""
    held = descending.clamp(min=0).cumsum(dim=-1)
    short = held < energy * held[..., -1:]
    return int(short.sum(dim=-1).max()) + 1 if bool(short.any()) else 1


class SharedFactors(NamedTuple):
    """Keys or values of a group of layers: x ~ coefficients @ vectors, layer after layer in the last axis."""

    coefficients: Tensor  # [B,n,r], shared by the layers
    vectors: Tensor  # [B,r,layers*W]
    layers: int

    @property
    def nbytes(self) -> int:
        return self.coefficients.nbytes + self.vectors.nbytes

    @ranged("rebuild")
    def rebuild(self, place: int, heads: int) -> Tensor:
        """What the layer at `place` of the group had, [B,H,n,D]."""
        return self.coefficients[:, None] @ self._of(place, heads)

    @ranged("rebuild")
    def rebuild_at(self, place: int, index: Tensor) -> Tensor:
        """Chosen tokens of what the layer at `place` had. index [B,H,s] -> [B,H,s,D]."""
        return ops.gather_shared(self.coefficients, index) @ self._of(place, index.shape[1])

    @ranged("attention")
    def weigh(self, weights: Tensor, place: int) -> Tensor:
        """weights @ rebuild(place), without rebuilding. weights [B,H,m,n] -> [B,H,m,D]."""
        return (weights @ self.coefficients[:, None]) @ self._of(place, weights.shape[1])

    def _of(self, place: int, heads: int) -> Tensor:
        """Vectors of one layer, [B,H,r,D]."""
        width = self.vectors.shape[2] // self.layers
        own = self.vectors[:, :, place * width : (place + 1) * width]
        by_head: Tensor = own.unflatten(2, (heads, -1)).transpose(1, 2)
        return by_head


def share(layers: list[Tensor], rank: int, dtype: torch.dtype) -> SharedFactors:
    """The best linear factors of the layers side by side. layers [B,H,n,D] each."""
    side_by_side = torch.cat([x.float().transpose(1, 2).flatten(2) for x in layers], dim=2)
    basis = fit(side_by_side.split(BLOCK_TOKENS, dim=1), rank, centred=False)
    return SharedFactors(basis.project(side_by_side).to(dtype), basis.vectors.to(dtype), len(layers))
