"""Which token comes next: the most likely one, or one drawn by temperature and top-p from a number that is given.

A draw is a pure function of logits and one uniform number, so whoever keeps the numbers can repeat it. Temperature and
nucleus: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv 1904.09751), in the usual order: logits
are divided by the temperature first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[Tensor], Tensor]  # logits [B,vocab] -> tokens [B]


def most_likely(logits: Tensor) -> Tensor:
    """The greedy choice, [B] of logits [B,vocab]."""
    return logits.argmax(dim=-1)


def drawn(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens [B] by the inverse of the cumulative probabilities of logits [B,vocab] at `uniform` [B] of [0,1).

    Probabilities are of fp64, whatever type the logits have. They are added up in the order of token ids, which logits
    do not change: two rows that differ a little and share a number then mostly draw the same token.
    """
    kept = nucleus(probabilities(logits, temperature), top_p)
    reached = kept.cumsum(dim=-1)
    # The largest fp64 below 1, times the whole, is rounded to below the whole: a token without probability, where
    # nothing is added, is never found.
    found = torch.searchsorted(reached, uniform.to(reached)[:, None] * reached[:, -1:], right=True)[:, 0]
    return found.clamp_max(logits.shape[-1] - 1)  # of logits that are not finite, which the caller refuses


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of logits [B,vocab] over a temperature above 0, fp64; -inf is never drawn."""
    scores = logits.double()
    # The largest is taken off first: divided by a tiny temperature it would overflow.
    return ((scores - scores.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)


def nucleus(shares: Tensor, top_p: float) -> Tensor:
    """Probabilities [B,vocab] with those outside the nucleus set to 0, not normalised.

    The nucleus holds the fewest tokens, most likely first and of equal ones the lower id, that reach `top_p` together;
    so at least one.
    """
    if top_p >= 1:
        return shares
    ordered, places = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return shares.masked_fill(torch.zeros_like(shares, dtype=torch.bool).scatter(-1, places, before >= top_p), 0.0)
