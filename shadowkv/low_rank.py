"""Rank-r approximation of a layer's pre-RoPE keys, by eigendecomposition of their Gram matrix.

The Gram matrix is W x W however long the prompt is: no SVD of [S, W] is ever taken. Keys are centred first: an
affine fit of rank r is never worse than a linear one, and models with a bias on the key projection (Qwen2) would
otherwise spend the first direction on their mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_TOKENS = 8192


class Basis(NamedTuple):
    """x ~ coefficients @ vectors + mean, for x [B,n,W]."""

    vectors: Tensor  # [B,r,W] orthonormal rows
    mean: Tensor  # [B,1,W]

    def project(self, x: Tensor) -> Tensor:
        """Coefficients of x. [B,n,W] -> [B,n,r], fp32."""
        return (x.float() - self.mean.float()) @ self.vectors.float().mT


def fit(x: Tensor, rank: int, energy: float = 0.0) -> Basis:
    """The best basis of `rank` directions or, given `energy`, of as many as hold that share of the squared norm.

    x [B,n,W] fp32. Products are accumulated in fp64, block by block, so that small singular values survive being
    squared. Directions beyond the rank of x are arbitrary but orthonormal.
    """
    width = x.shape[-1]
    mean = x.mean(dim=1, keepdim=True, dtype=torch.float64)
    gram = torch.zeros(x.shape[0], width, width, dtype=torch.float64, device=x.device)
    for block in x.split(_BLOCK_TOKENS, dim=1):
        centred = block.double() - mean
        gram += centred.mT @ centred
    values, vectors = torch.linalg.eigh(gram)
    if energy:
        rank = _rank_for(values.flip(-1), energy)
    return Basis(vectors.flip(-1)[..., :rank].mT.float().contiguous(), mean.float())


def _rank_for(descending: Tensor, energy: float) -> int:
    """The smallest rank whose directions hold `energy` of the total, in every row of the batch."""
    held = descending.clamp(min=0).cumsum(dim=-1)
    short = held < energy * held[..., -1:]
    return int(short.sum(dim=-1).max()) + 1 if bool(short.any()) else 1
