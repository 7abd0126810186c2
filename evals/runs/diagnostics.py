"""How well a method selects, beside what it scores: every layer against full attention, on the same inputs.

The model is fed full attention's answer and goes on with full attention's outputs, so that a layer is judged by what
it does itself, not by what earlier layers have spoilt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes
from shadowkv.contract.layerwise import LayerwiseMethod
from shadowkv.contract.method import DecodeCache, Guess, LayerKV, Method
from shadowkv.contract.with_prefill import WithPrefill
from shadowkv.contract.wrapper import Wrapper
from shadowkv.engine.engine import Engine
from shadowkv.engine.snapshots import Prefill
from shadowkv.methods.full.method import Full
from shadowkv.tensors import ops

_LONGEST_TOKENS = 16384  # spelling positions takes n x n values per head of one layer


@dataclass(frozen=True)
class Diagnosis:
    """By layer, in order. output_error: |o - o_full| / |o_full|, mean over heads and tokens. recall: share of full
    attention's mass on the tokens that the method attends to, at the first step; None where it cannot be told."""

    output_error: list[float]
    recall: list[float | None]


def diagnose(
    engine: Engine,
    prefill: Prefill,
    method: Method,
    max_new_tokens: int,
    stop_ids: Collection[int],
    question: Sequence[int] = (),
) -> Diagnosis:
    """Compare a method with full attention over the answer that full attention gives to this prompt.

    question: tokens that come after the prompt, which the method's cache is fed before the answer.
    """
    exact = Full() if prefill.sparse is None else WithPrefill(Full(), prefill.sparse)
    observed = _Observed(method)
    cache, logits = engine.replay(prefill, exact), prefill.logits
    if question:
        logits = engine.extend(cache, torch.tensor([list(question)]))
    answer = engine.decode(cache, logits, max_new_tokens, stop_ids)[0]
    fed = answer[:-1] or [int(logits[0].argmax())]
    cache = engine.replay(prefill, observed)
    if question:
        engine.extend(cache, torch.tensor([list(question)]))
    engine.extend(cache, torch.tensor([fed]))
    beside = observed.made[0]
    layers = sorted(beside.errors)
    diagnosis = Diagnosis([beside.errors[layer] for layer in layers], [beside.recall(layer) for layer in layers])
    cache.close()
    return diagnosis


@dataclass(frozen=True)
class _Observed(Wrapper):
    """A method whose caches are compared with full attention; `made` are those made so far."""

    made: list[_Beside] = field(default_factory=list, compare=False)

    def new_state(self, rope: Rope) -> DecodeCache:
        self.made.append(_Beside(self.method, rope))
        return self.made[-1]


class _Fed(NamedTuple):
    """What one layer attended with: q and k of some tokens."""

    q: Tensor
    k: Tensor
    scaling: float


class _Beside(DecodeCache):
    """A method and full attention on the same queries; what comes out is full attention's.

    `errors` are of the tokens fed last.
    """

    def __init__(self, method: Method, rope: Rope) -> None:
        self.errors: dict[int, float] = {}
        self._fed: dict[int, list[_Fed]] = defaultdict(list)
        self._method, self._rope = method, rope
        self._inner, self._exact = method.new_state(rope), Full().new_state(rope)
        self._prompt: dict[int, LayerKV] = {}

    def ingest(self, layer: int, kv: LayerKV) -> None:
        self._inner.ingest(layer, kv)
        self._exact.ingest(layer, kv)
        self._prompt[layer] = kv

    def complete(self) -> None:
        self._inner.complete()

    def foresee(self, guess: Guess) -> None:
        self._inner.foresee(guess)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        got = self._inner.attend(layer, q, k, v, scaling)
        expected = self._exact.attend(layer, q, k, v, scaling)
        error = (got.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-12)
        self.errors[layer] = float(error.mean())
        self._fed[layer].append(_Fed(q, k, scaling))
        return expected

    def recall(self, layer: int) -> float | None:
        """Of the first token fed last. By values that spell their positions: what attention gives is its weights."""
        kv = self._prompt[layer]
        *question, last = self._fed[layer]
        method = self._method.core.reference()
        tokens = kv.k.shape[2]
        if not isinstance(method, LayerwiseMethod) or "budget" not in method.params() or tokens > _LONGEST_TOKENS:
            return None
        fed = [*question, _Fed(last.q[:, :, :1], last.k[:, :, :1], last.scaling)]
        ends = list(accumulate((step.k.shape[2] for step in fed), initial=tokens))
        spelled = torch.eye(ends[-1], dtype=kv.v.dtype, device=kv.v.device)[None, None]
        shape = (*kv.k.shape[:2], -1, -1)
        state = method.new_layer(layer, kv._replace(v=spelled[:, :, :tokens].expand(shape)), self._rope)
        for step, (begin, end) in zip(fed, pairwise(ends), strict=True):
            weights = state.attend(step.q, step.k, spelled[:, :, begin:end].expand(shape), step.scaling)
        keys = torch.cat((kv.k, *(step.k for step in fed)), dim=2)
        full = ops.attention_weights(fed[-1].q, keys, last.scaling).flatten(1, 2)
        return float((full * (weights[:, :, 0] > 0)).sum(dim=-1).mean())

    def nbytes(self) -> Bytes:
        return self._inner.nbytes() + self._exact.nbytes()

    def close(self) -> None:
        self._inner.close()
        self._exact.close()
        self._prompt.clear()
        self._fed.clear()
