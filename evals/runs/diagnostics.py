"""How well a method selects, beside what it scores: every layer against full attention, on the same inputs.

The model is fed full attention's answer and goes on with full attention's outputs, so that a layer is judged by what
it does itself, not by what earlier layers have spoilt.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

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
    engine: Engine, prefill: Prefill, method: Method, max_new_tokens: int, stop_ids: Collection[int]
) -> Diagnosis:
    """Compare a method with full attention over the answer that full attention gives to this prompt."""
    exact = Full() if prefill.sparse is None else WithPrefill(Full(), prefill.sparse)
    answer = engine.decode(engine.replay(prefill, exact), prefill.logits, max_new_tokens, stop_ids)[0]
    fed = answer[:-1] or [int(prefill.logits[0].argmax())]
    observed = _Observed(method)
    cache = engine.replay(prefill, observed)
    engine.extend(cache, torch.tensor([fed]))
    layers = sorted(observed.made[0].errors)
    diagnosis = Diagnosis(
        [observed.made[0].errors[layer] for layer in layers], [observed.made[0].recalls[layer] for layer in layers]
    )
    cache.close()
    return diagnosis


@dataclass(frozen=True)
class _Observed(Wrapper):
    """A method whose caches are compared with full attention; `made` are those made so far."""

    made: list[_Beside] = field(default_factory=list, compare=False)

    def new_state(self, rope: Rope) -> DecodeCache:
        self.made.append(_Beside(self.method, rope))
        return self.made[-1]


class _Beside(DecodeCache):
    """A method and full attention on the same queries; what comes out is full attention's."""

    def __init__(self, method: Method, rope: Rope) -> None:
        self.errors: dict[int, float] = {}
        self.recalls: dict[int, float | None] = {}
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
        self.recalls[layer] = self._recall(layer, q[:, :, :1], k[:, :, :1], scaling)
        return expected

    def _recall(self, layer: int, q: Tensor, k: Tensor, scaling: float) -> float | None:
        """By values that spell their positions: the output of attention is then its weights."""
        kv = self._prompt[layer]
        method = self._method.core.reference()
        tokens = kv.k.shape[2]
        if not isinstance(method, LayerwiseMethod) or "budget" not in method.params() or tokens > _LONGEST_TOKENS:
            return None
        spelled = torch.eye(tokens + 1, dtype=kv.v.dtype, device=kv.v.device)
        shape = (*kv.k.shape[:2], -1, -1)
        state = method.new_layer(layer, kv._replace(v=spelled[None, None, :tokens].expand(shape)), self._rope)
        weights = state.attend(q, k, spelled[None, None, tokens:].expand(shape), scaling)
        full = ops.attention_weights(q, torch.cat((kv.k, k), dim=2), scaling).flatten(1, 2)
        return float((full * (weights[:, :, 0] > 0)).sum(dim=-1).mean())

    def nbytes(self) -> Bytes:
        return self._inner.nbytes() + self._exact.nbytes()

    def close(self) -> None:
        self._inner.close()
        self._exact.close()
        self._prompt.clear()
