"""Next-token distributions of full attention, kept once per prompt, and how far a method's are from them.

The whole distributions are kept where they fit. Else those of the most likely tokens and the mass of all others: the
divergence is then that of distributions in which the others are one token, which is never larger than the whole one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEPT_BYTES = 64 * 2**20  # of full attention's distributions, per prompt
TOP = 5
_WORKING_BYTES = 32 * 2**20
_LEAST_MASS = 1e-300  # of a rest that rounding has made nothing of


@dataclass(frozen=True)
class Distributions:
    """After each of N tokens: log probabilities [N,K] fp32, of which tokens (None: all), and the others' mass [N]."""

    log_p: Tensor
    ids: Tensor | None  # [N,K], most likely first
    rest: Tensor  # fp64
    top: Tensor  # [N,TOP] ids, most likely first
    vocabulary: int

    @property
    def described(self) -> str:
        """What is kept of each, for records."""
        return "whole" if self.ids is None else f"top {self.log_p.shape[1]} and the rest"

    @property
    def nbytes(self) -> int:
        return self.log_p.nbytes + (0 if self.ids is None else self.ids.nbytes)


@dataclass(frozen=True)
class Distances:
    """Of a method from full attention after each of N tokens.

    kl: KL(full || method) in nats. nll: of the token that comes next. top1: whether both find the same token most
    likely. top5: how many of full attention's five are among the method's. rank: of full attention's in the method's.
    """

    kl: list[float]
    nll: list[float]
    top1: list[int]
    top5: list[int]
    rank: list[int]


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens may be fed at a time so that their logits, fp32, are no larger than what is kept."""
    return max(1, KEPT_BYTES // (4 * vocabulary))


def keep(pieces: list[Distributions]) -> Distributions:
    """One after the other, as one."""
    first = pieces[0]
    return Distributions(
        torch.cat([piece.log_p for piece in pieces]),
        None if first.ids is None else torch.cat([piece.ids for piece in pieces if piece.ids is not None]),
        torch.cat([piece.rest for piece in pieces]),
        torch.cat([piece.top for piece in pieces]),
        first.vocabulary,
    )


def kept_of(logits: Tensor, tokens: int) -> Distributions:
    """What is kept of logits [T,V] after some of `tokens` tokens in all, so that they fit together."""
    vocabulary = logits.shape[1]
    top = logits.topk(min(TOP, vocabulary), dim=-1).indices
    if tokens * vocabulary * 4 <= KEPT_BYTES:
        rest = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        return Distributions(logits.log_softmax(dim=-1), None, rest, top, vocabulary)
    count = max(TOP, min(vocabulary - 1, KEPT_BYTES // (12 * tokens)))  # fp32 beside its int64 id
    log_p, ids = logits.log_softmax(dim=-1).topk(count, dim=-1)
    rest = (1 - log_p.double().exp().sum(dim=-1)).clamp_min(0)
    return Distributions(log_p, ids, rest, top, vocabulary)


def distances(full: Distributions, start: int, logits: Tensor, coming: Tensor) -> Distances:
    """A method's logits [T,V] after tokens `start`.. of those kept, and the tokens [T] that come next.

    Raises `ValueError` where the vocabularies differ.
    """
    if logits.shape[1] != full.vocabulary:
        raise ValueError(f"vocabularies differ: {full.vocabulary} and {logits.shape[1]} tokens")
    step = max(1, _WORKING_BYTES // (8 * full.vocabulary))
    parts = [
        _distances(full, slice(start + begin, start + begin + len(piece)), piece, coming[begin : begin + len(piece)])
        for begin, piece in zip(range(0, len(logits), step), logits.split(step), strict=True)
    ]
    return joined(parts)


def joined(parts: list[Distances]) -> Distances:
    """One after the other, as one."""
    fields = ("kl", "nll", "top1", "top5", "rank")
    return Distances(*([x for part in parts for x in getattr(part, name)] for name in fields))


def _distances(full: Distributions, rows: slice, logits: Tensor, coming: Tensor) -> Distances:
    log_p, top, rest = full.log_p[rows].double(), full.top[rows], full.rest[rows]
    whole = logits.log_softmax(dim=-1).double()  # rounded as what is kept: alike logits are at no distance
    log_q = whole if full.ids is None else whole.gather(1, full.ids[rows])
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    if full.ids is not None:
        others = (1 - log_q.exp().sum(dim=-1)).clamp_min(_LEAST_MASS)
        kl += torch.where(rest > 0, rest * (rest.clamp_min(_LEAST_MASS) / others).log(), 0.0)
    best = top[:, :1]
    own = logits.topk(top.shape[1], dim=-1).indices
    return Distances(
        kl=kl.tolist(),
        nll=(-whole.gather(1, coming[:, None])[:, 0]).tolist(),
        top1=(own[:, 0] == top[:, 0]).int().tolist(),
        top5=(own[:, :, None] == top[:, None]).any(dim=1).sum(dim=-1).tolist(),
        rank=(1 + (logits > logits.gather(1, best)).sum(dim=-1)).tolist(),
    )
