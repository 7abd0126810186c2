"""Loki: rank tokens by the first few principal components of their keys, attend to the best with all of them.

Paper: https://arxiv.org/abs/2406.02542. Known differences from the authors' code:
- as theirs, components are made once per model from a text, by keys before RoPE or after, whichever serves the model
  better, and applied to keys after RoPE (`skv calibrate loki`, which is also done on the way). Theirs are of all of
  WikiText, C4 or BookCorpus and the better kind is found by evaluation; here of 4096 tokens, in whose last quarter the
  kind is kept by which more of the best tokens are chosen (the overlap that they too measure; on SmolLM2 0.52 with keys
  after RoPE, 0.46 before, and needles are found by the former. Attention mass would have it the other way round: 0.83
  and 0.93). `basis=prompt` takes the components of the prompt's own keys, after RoPE, instead: it needs no data; a very
  short prompt has few directions to offer;
- `budget` is in tokens; theirs is a share of the context (a quarter);
- the projected keys are a copy beside the full ones, which stay as they are; theirs turns the full keys and reads
  their first columns, which costs no memory but strided reads;
As theirs, each query head ranks for itself and the newest token is a candidate like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.common.ranges import ranged
from shadowkv.contract.calibration import Calibration, calibration_file, load_calibration
from shadowkv.contract.layerwise import LayerState, LayerwiseMethod, StepwiseState
from shadowkv.contract.method import DecodeCache, LayerKV, Method
from shadowkv.contract.setting import require
from shadowkv.tensors import low_rank, ops
from shadowkv.tensors.buffers import TokenBuffer

_OWN, _PROMPT = "calibrated", "prompt"


@dataclass(frozen=True)
class Loki(LayerwiseMethod):
    """budget: tokens attended to per step · rank: components that rank them (auto: a quarter of the head size) ·
    basis: where they come from: calibrated (the model's own calibration), a calibration by `skv calibrate`, name or
    file, or prompt · reduce: per_q_head, group_max, group_mean or group_sum."""

    name: ClassVar[str] = "loki"
    summary: ClassVar[str] = "full cache, reads the tokens with the largest q k in a few principal components"
    paper: ClassVar[str] = "2406.02542"
    compared: ClassVar[str | None] = "hpcgroup/loki@005913bc, 2026-11-25: same tokens, on components of the same keys"
    calibration: ClassVar[str | None] = "basis"

    budget: int = 2048
    rank: int | None = None
    basis: str = "calibrated"
    reduce: str = "per_q_head"

    def __post_init__(self) -> None:
        require(self.budget >= 1, f"loki: budget must be at least 1, got {self.budget}")
        require(self.rank is None or self.rank >= 1, f"loki: rank must be at least 1, got {self.rank}")
        require(
            self.reduce in ops.GROUP_REDUCTIONS,
            f"loki: reduce={self.reduce} is unknown; one of {', '.join(ops.GROUP_REDUCTIONS)}",
        )

    def rank_for(self, head_dim: int) -> int:
        """Components used on heads of this size."""
        return max(head_dim // 4, 1) if self.rank is None else self.rank

    def check(self, dims: Dims) -> None:
        require(
            self.rank is None or self.rank <= dims.head_dim,
            f"loki: rank={self.rank} exceeds the head size of this model, {dims.head_dim}",
        )
        if self.basis not in (_OWN, _PROMPT):
            shape = (dims.kv_heads, dims.head_dim, dims.head_dim)
            fits = all(layer in self.components and self.components[layer].shape == shape for layer in dims.layer_ids)
            require(fits, f"loki: the calibration '{self.basis}' is of a model of another geometry than this one")

    def on_calibration(self, name: str | None) -> Method:
        return replace(self, basis=name or _PROMPT) if self.basis == _OWN else self

    def files(self) -> dict[str, Path]:
        return {} if self.basis in (_OWN, _PROMPT) else {"basis": calibration_file(self.name, self.basis)}

    @cached_property
    def components(self) -> dict[int, Tensor]:
        """The calibration of `basis`: [H,D,D] by layer number, a component per row, the largest first."""
        return load_calibration(self.name, self.basis)

    @staticmethod
    def calibrate(layers: Mapping[int, LayerKV], rope: Rope) -> Calibration:
        """Components of a text's keys before and after RoPE, of the kind that ranks better in the text's last quarter.

        layers: its prefill with all queries, by layer number.
        """
        kinds = {"post-RoPE": {n: kv.k for n, kv in layers.items()}}
        if rope.knows(layers):
            kinds["pre-RoPE"] = {n: _unrotated(rope, n, kv.k) for n, kv in layers.items()}
        found, overlap = {}, {}
        for kind, keys in kinds.items():
            found[kind] = {n: _components(k[:, :, : _fitted(k)], k.shape[3]) for n, k in keys.items()}
            overlap[kind] = fmean(_overlap(kv, found[kind][n]) for n, kv in layers.items())
        best = max(overlap, key=overlap.__getitem__)
        said = ", ".join(f"{kind} {share:.3f}" for kind, share in overlap.items())
        return Calibration(found[best], {"components": f"of {best} keys; overlap with the best tokens: {said}"})

    def new_state(self, rope: Rope) -> DecodeCache:
        require(
            self.basis != _OWN,
            "loki: basis=calibrated is the calibration of a model, which has to be named: basis=NAME, as "
            "skv calibrate loki made it, or basis=prompt",
        )
        return super().new_state(rope)

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        return _LokiLayer(self, layer, kv)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        projected = dims.layers * dims.kv_heads * self.rank_for(dims.head_dim) * dims.element_bytes
        return Bytes(dims.full_bytes_per_token + projected, 0)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        return min(tokens + later, self.budget)

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        heads, rank = dims.layers * dims.kv_heads, self.rank_for(dims.head_dim)
        basis = heads * rank * dims.head_dim * 4  # fp32
        return {
            "keys and values": Bytes(tokens * dims.full_bytes_per_token, 0),
            "projected keys": Bytes(heads * tokens * rank * dims.element_bytes + basis, 0),
        }

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        return dims.gathered_bytes(self.reduce, self.budget, tokens)

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        gathered = self.workspace_bytes(dims, tokens)
        if not gathered:
            return tokens * dims.full_bytes_per_token
        return self.memory_parts(dims, tokens)["projected keys"].device + dims.layers * gathered

    def step_flop(self, dims: Dims, tokens: int) -> int:
        ranked = tokens * self.rank_for(dims.head_dim) if self.budget <= tokens else 0
        return super().step_flop(dims, tokens) + 2 * dims.layers * dims.q_heads * ranked

    def lossless(self, dims: Dims, tokens: int) -> Method:
        # Everything is read, whatever ranks it.
        return replace(self, budget=tokens, basis=_PROMPT)


class _LokiLayer(StepwiseState):
    def __init__(self, method: Loki, layer: int, kv: LayerKV) -> None:
        self._budget = method.budget
        self._reduce = ops.GROUP_REDUCTIONS[method.reduce]
        self._k, self._v = TokenBuffer(kv.k, axis=2), TokenBuffer(kv.v, axis=2)
        rank = method.rank_for(kv.k.shape[-1])
        if method.basis == _PROMPT:
            self._basis = _components(kv.k, rank)
        else:
            self._basis = method.components[layer][:, :rank].to(kv.k.device).repeat(kv.k.shape[0], 1, 1)
        self._projected = TokenBuffer(self._project(kv.k), axis=2)

    def _project(self, k: Tensor) -> Tensor:
        """[B,H,n,D] -> [B,H,n,r]."""
        return low_rank.project(k.flatten(0, 1), self._basis).view(*k.shape[:3], -1).to(k.dtype)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._k.append(k)
        self._v.append(v)
        self._projected.append(self._project(k))
        keys, values = self._k.view, self._v.view
        if self._budget >= len(self._k):
            return ops.attend(q, [(keys, values)], scaling)
        index = self._best(q, scaling)
        return ops.attend(q, [(ops.gather_lists(keys, index), ops.gather_lists(values, index))], scaling)

    @ranged("selection")
    def _best(self, q: Tensor, scaling: float) -> Tensor:
        """The tokens to attend to, for each list of a KV head. [B,H,L,s]."""
        by_group = q.reshape(q.shape[0] * self._k.view.shape[1], -1, q.shape[-1])
        q_projected = (by_group.float() @ self._basis.mT).view(*q.shape[:3], -1)
        # Weights and not scores, which have no common zero that would let heads of a group be compared.
        weights = self._reduce(ops.attention_weights(q_projected, self._projected.view, scaling))
        return ops.top_indices(weights, self._budget)

    def nbytes(self) -> Bytes:
        buffers = sum(buffer.nbytes() for buffer in (self._k, self._v, self._projected))
        return Bytes(buffers + self._basis.nbytes, 0)


def _components(k: Tensor, rank: int) -> Tensor:
    """Principal components of each head's keys: heads are rows of a batch to `low_rank`. [B,H,n,D] -> [B*H,r,D]."""
    return low_rank.fit(k.flatten(0, 1).split(low_rank.BLOCK_TOKENS, dim=1), rank, centred=True)


def _unrotated(rope: Rope, layer: int, k: Tensor) -> Tensor:
    return rope.unrotate(layer, k, torch.arange(k.shape[2], device=k.device), k.shape[2])


def _fitted(k: Tensor) -> int:
    """Tokens of a calibration text that components are made of; the others judge them."""
    return k.shape[2] * 3 // 4


def _overlap(kv: LayerKV, components: Tensor) -> float:
    """How much the best quarter of the tokens, and those that rank so by a quarter of the components, have in common.

    Jaccard index, mean over a text's last queries and heads. components [H,D,D].
    """
    rank = max(kv.k.shape[3] // 4, 1)
    rows = components[None, :, :rank].mT
    q = kv.q_tail.unflatten(1, (kv.k.shape[1], -1)).flatten(2, 3).float()
    k = kv.k.float()
    count = max(k.shape[2] // 4, 1)
    chosen, best = (ops.top_mask(scores, count) for scores in ((q @ rows) @ (k @ rows).mT, q @ k.mT))
    return float(((chosen & best).sum(dim=-1) / (chosen | best).sum(dim=-1)).mean())
