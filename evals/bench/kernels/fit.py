"""How the factorisation of keys is measured: beside torch's own, by how much of the keys both leave."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from evals.bench.kernels.cases import Case
from evals.bench.kernels.items import Subject, Way
from shadowkv.tensors import low_rank

_LARGEST_SVD = 2**24  # elements; a row of 122K tokens would take minutes at a time
_EXCESS_BOUND = 1e-3  # of the error that the best factors of that rank leave


def factorisation(case: Case) -> Subject:
    """`low_rank.fit` of one row's random keys, whose spectrum decays, beside torch's decomposition."""
    decay = torch.arange(1, case.width + 1, device=case.device) ** -0.5
    mixing = torch.linalg.qr(torch.randn(case.width, case.width, device=case.device)).Q
    x = (torch.randn(1, case.tokens, case.width, device=case.device) * decay) @ mixing
    rank = min(case.rank, case.width)

    def by_svd() -> Tensor:
        directions: Tensor = torch.linalg.svd(x[0], full_matrices=False).Vh
        return directions[:rank]

    def by_gram() -> Tensor:
        wide = x[0].double()
        vectors: Tensor = torch.linalg.eigh(wide.mT @ wide).eigenvectors
        return vectors.flip(1)[:, :rank].mT.to(x.dtype)

    small = x.numel() <= _LARGEST_SVD
    return Subject(
        (lambda: low_rank.fit(x.split(low_rank.BLOCK_TOKENS, dim=1), rank)[0],),
        (by_svd if small else by_gram,),
        _EXCESS_BOUND,
        besides=(Way("torch.linalg.svd", lambda: [by_svd], False),) if small else (),
        capturable=False,
        error=partial(_excess_error, x[0]),
    )


def _excess_error(x: Tensor, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """By which share `got` leaves more of x than `wanted` does. x [n,W], directions [r,W]."""
    floor = 1e-5 * float(x.double().norm())  # below it there is rounding only
    left = [max(float((x - (x @ basis.mT) @ basis).double().norm()), floor) for basis in (*got, *wanted)]
    return left[0] / left[1] - 1
