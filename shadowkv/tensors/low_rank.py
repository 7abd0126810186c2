"""Rank-r approximation of keys before RoPE, and of values, by eigendecomposition of their Gram matrix.

The Gram matrix is W x W however long the prompt is, and a sum over its tokens: no SVD of [S, W] is ever taken, nor does
the prompt have to be there as a whole. On a GPU only its leading vectors are looked for, by products (`leading`). What
is kept of keys or values is a linear fit, as in the authors' codes: one around the mean has the smaller error as a
matrix and the larger one after attention, because it spoils short rows, such as the first token's, which much attention
goes to. On SmolLM2 at 4k and rank 32, with no token kept exact, the divergence from full attention (KL, three needle
prompts and a text) is 0.25, 0.22, 0.18 and 0.78 around the mean, and 0.02, 0.02, 0.03 and 0.28 around zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from shadowkv.common.ranges import ranged
from shadowkv.tensors import ops

BLOCK_TOKENS = 8192  # what is made of a prompt in fp32 at a time
_OVERSAMPLED = 32  # directions that are followed beyond those wanted: what lies between decides how fast they settle
_ROUNDS = 8
_SEED = 0


def fit(blocks: Iterable[Tensor], rank: int, energy: float = 0.0, *, centred: bool = False) -> Tensor:
    """The best `rank` directions or, given `energy`, as many as hold that share of the squared norm. fp32 [B,r,W].

    blocks: x [B,n,W], in pieces along n; x ~ (x @ directions.mT) @ directions. Rows are orthonormal, the strongest
    first. Products are accumulated in fp64, so that small singular values survive being squared. Directions beyond the
    rank of x are arbitrary but orthonormal. centred: of x less the mean of its tokens, which is principal components.
    """
    pieces = iter(blocks)
    first = next(pieces).double()
    # What is squared stays small around a point near the mean, which is known only at the end.
    origin = first.mean(dim=1, keepdim=True) if centred else torch.zeros_like(first[:, :1])
    total, gram, tokens = torch.zeros_like(origin), torch.zeros_like(origin.mT @ origin), 0
    for block in chain([first], pieces):
        shifted = block.double() - origin
        total += shifted.sum(dim=1, keepdim=True)
        gram += shifted.mT @ shifted
        tokens += shifted.shape[1]
    if centred:
        offset = total / tokens
        gram -= tokens * offset.mT @ offset
    found = leading(gram, rank) if not energy and _iterates(gram.device.type, gram.shape[-1], rank) else None
    if found is None:
        values, vectors = torch.linalg.eigh(gram)
        if energy:
            rank = _rank_for(values.flip(-1), energy)
        found = vectors.flip(-1)[..., :rank]
    directions: Tensor = found.mT.float().contiguous()
    return directions


def leading(gram: Tensor, rank: int) -> Tensor | None:
    """Eigenvectors of the `rank` largest eigenvalues of gram [B,W,W], positive semidefinite, fp64. [B,W,r], or None.

    Subspace iteration from a random start of its own seed (Halko, Martinsson, Tropp 2011), each round a Chebyshev
    polynomial of the matrix, small on all eigenvalues below those followed, and a Rayleigh-Ritz step (Saad,
    Numerical Methods for Large Eigenvalue Problems, chapter 5). Settled once a round adds less than 1e-7 of what the
    vectors hold and 1e-5 of what they leave; None where that takes too many rounds, or what is followed vanishes.
    """
    followed = rank + _OVERSAMPLED
    start = torch.Generator(gram.device).manual_seed(_SEED)
    x = torch.randn(gram.shape[-1], followed, generator=start, dtype=gram.dtype, device=gram.device)
    values, x, product = _ritz(gram, torch.linalg.qr(gram @ x)[0])
    total, held = gram.diagonal(dim1=-2, dim2=-1).sum(-1), values[..., :rank].sum(-1)
    for _ in range(_ROUNDS):
        largest, cut = float(values[..., 0].max()), values[..., -1:, None]
        spread = float((values[..., 0] / values[..., -1]).max())
        if not (largest > 0 and 0 < spread < 1 / torch.finfo(gram.dtype).eps):
            return None
        y = _orthonormal(_filtered(gram, x, product, cut, _degree(spread)))
        if y is None:
            return None
        values, x, product = _ritz(gram, y)
        before, held = held, values[..., :rank].sum(-1)
        gained = held - before
        enough = torch.minimum(1e-7 * held, 1e-5 * (total - held)).maximum(1e-13 * total)
        if bool((gained <= enough).all()):
            return x[..., :rank]
    return None


def _iterates(device_type: str, width: int, rank: int) -> bool:
    """Whether `leading` is the faster way. On a CPU it gains little, and results stay what they were."""
    return device_type == "cuda" and rank + _OVERSAMPLED <= width // 4


def _degree(spread: float) -> int:
    """Of a polynomial that parts eigenvalues as far as digits allow: the largest outgrow those `spread` times smaller.

    What is lost of the smaller ones by rounding is then a millionth at most.
    """
    return max(1, min(16, int(math.log(1e10) / math.log(4 * spread))))


def _filtered(gram: Tensor, x: Tensor, product: Tensor, cut: Tensor, degree: int) -> Tensor:
    """The Chebyshev polynomial of `gram` that is within 1 on [0, cut] and grows beyond, times x. product: gram @ x."""
    before, now = x, 2 / cut * product - x
    for _ in range(degree - 1):
        before, now = now, 2 * (2 / cut * (gram @ now) - now) - before
    return now


def _orthonormal(x: Tensor) -> Tensor | None:
    """An orthonormal basis of columns that are nearly orthogonal already, by Cholesky, twice; None if they are not."""
    x = x / x.norm(dim=-2, keepdim=True)
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(x.mT @ x)
        if bool(failed.any()):
            return None
        x = torch.linalg.solve_triangular(factor.mT, x, upper=True, left=False)
    return x


def _ritz(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What an orthonormal basis [B,W,m] knows of eigenvalues, descending, and vectors; and gram times these."""
    product = gram @ basis
    values, turn = torch.linalg.eigh(basis.mT @ product)
    turn = turn.flip(-1)
    return values.flip(-1), basis @ turn, product @ turn


def arbitrary(rows: Tensor, rank: int) -> Tensor:
    """Directions that nothing was fitted to, orthonormal as those of `fit`, the same every time. [B,n,W] -> [B,r,W]."""
    batch, width = rows.shape[0], rows.shape[2]
    start = torch.Generator(rows.device).manual_seed(_SEED)
    noise = torch.randn(batch, width, min(rank, width), generator=start, device=rows.device)
    directions: Tensor = torch.linalg.qr(noise)[0].mT.contiguous()
    return directions


def project(x: Tensor, directions: Tensor) -> Tensor:
    """Coefficients of x [B,n,W] on rows of directions [B,r,W]. fp32 [B,n,r]."""
    return x.float() @ directions.float().mT


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
    """The best factors of the layers side by side. layers [B,H,n,D] each."""
    side_by_side = torch.cat([x.float().transpose(1, 2).flatten(2) for x in layers], dim=2)
    vectors = fit(side_by_side.split(BLOCK_TOKENS, dim=1), rank)
    return SharedFactors(project(side_by_side, vectors).to(dtype), vectors.to(dtype), len(layers))
