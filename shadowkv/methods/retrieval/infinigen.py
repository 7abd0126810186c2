"""InfiniGen: keys and values on the host; each layer's attention is guessed from what the layer before it saw.

Paper: https://arxiv.org/abs/2406.19707. Known differences from the authors' code:
- by default the skew is made per request from the prompt's last queries, after RoPE, and needs no data;
  `skew=NAME` takes one made offline from a calibration text (`skv calibrate infinigen`), as theirs is, whose columns
  are still chosen per request. It is applied after RoPE and never folded into weights, which a RoPE cannot have;
- host keys stay as they are, since selected tokens are read with the true query: only the partial keys are skewed;
- the guess applies the guessed layer's own norm to the earlier layer's input (theirs has the earlier layer's norm);
- it is made when the guessed layer starts, from the same numbers: nothing is fetched ahead, so times are not theirs;
- as in their accuracy code, the guess looks at the channels in which the prompt's queries are largest and at those in
  which its keys are (the union of two lists of ratio * D); queries are the last ones, theirs all of them, and in a
  grouped-query model those of a group count together;
- every head has its own maximum for the threshold (their Llama code takes that of head 0), and how many tokens are
  fetched is decided per row of a batch;
- grouped-query models work: one skew per KV head, and the reduction over a group as a parameter;
- the newest token is always read and counts towards the budget; nothing is ever evicted from the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.common.ranges import ranged
from shadowkv.contract.calibration import Calibration, calibration_file, load_calibration
from shadowkv.contract.layerwise import DenseLayer
from shadowkv.contract.method import DecodeCache, Guess, LayerKV, Method
from shadowkv.contract.setting import require
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer
from shadowkv.tensors.stored import CodedTokens

_BLOCK_TOKENS = 8192  # keys that are turned at a time
_TIE_BREAK = 1e-9  # weight of keys where queries do not tell directions apart


@dataclass(frozen=True)
class InfiniGen(Method):
    """budget: most tokens read per step · alpha: read tokens whose guessed score is within this of the best ·
    ratio: share of the skewed channels that the guess takes from queries, and again from keys · dense_layers: first
    layers left full, on the device · reduce: per_q_head, group_max, group_mean or group_sum · skew: a calibration by
    `skv calibrate`, name or file (auto: from the prompt itself)."""

    name: ClassVar[str] = "infinigen"
    summary: ClassVar[str] = "full cache on the host, reads what the previous layer's input lets expect"
    paper: ClassVar[str] = "2406.19707"
    compared: ClassVar[str | None] = "snu-comparch/InfiniGen@3754f52d, 2026-11-25: same channels and tokens"
    calibration: ClassVar[str | None] = "skew"

    budget: int = 2048
    alpha: float = 5.0
    ratio: float = 0.2
    dense_layers: int = 2
    reduce: str = "per_q_head"
    skew: str | None = None

    def __post_init__(self) -> None:
        require(
            self.budget >= 2, f"infinigen: budget must be at least 2, the newest token and another, got {self.budget}"
        )
        require(self.alpha >= 0, f"infinigen: alpha must not be negative, got {self.alpha}")
        require(0 < self.ratio <= 1, f"infinigen: ratio={self.ratio} is not in (0, 1]")
        require(self.dense_layers >= 1, "infinigen: dense_layers must be at least 1, nothing foretells the first layer")
        require(
            self.reduce in ops.GROUP_REDUCTIONS,
            f"infinigen: reduce={self.reduce} is unknown; one of {', '.join(ops.GROUP_REDUCTIONS)}",
        )

    def check(self, dims: Dims) -> None:
        if self.skew is None:
            return
        shape = (dims.kv_heads, dims.head_dim, dims.head_dim)
        fits = all(
            layer in self.rotations and self.rotations[layer].shape == shape
            for layer in dims.layer_ids
            if layer >= self.dense_layers
        )
        require(fits, f"infinigen: the calibration '{self.skew}' is of a model of another geometry than this one")

    def files(self) -> dict[str, Path]:
        return {} if self.skew is None else {"skew": calibration_file(self.name, self.skew)}

    @cached_property
    def rotations(self) -> dict[int, Tensor]:
        """The calibration of `skew`: [H,D,D] by layer number."""
        assert self.skew is not None
        return load_calibration(self.name, self.skew)

    @staticmethod
    def calibrate(layers: Mapping[int, LayerKV], rope: Rope) -> Calibration:
        """[H,D,D] fp32 of each layer, from the prefill of a text with all its queries."""
        return Calibration({n: rotation(kv.q_all, kv.k)[0] for n, kv in layers.items() if kv.q_all is not None}, {})

    def columns(self, head_dim: int) -> int:
        """Channels taken from queries, and again from keys."""
        return max(int(self.ratio * head_dim), 1)

    def most_columns(self, head_dim: int) -> int:
        """Channels of the partial keys of a head, where queries and keys agree on none."""
        return min(2 * self.columns(head_dim), head_dim)

    @property
    def speculates(self) -> bool:
        return True

    def new_state(self, rope: Rope) -> DecodeCache:
        return _InfiniGenCache(self)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        guessed = dims.layers_from(self.dense_layers)
        dense_bytes = 2 * dims.width * dims.element_bytes
        partial_bytes = dims.kv_heads * self.most_columns(dims.head_dim) * dims.element_bytes
        return Bytes((dims.layers - guessed) * dense_bytes + guessed * partial_bytes, guessed * dense_bytes)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        guessed = dims.layers_from(self.dense_layers)
        held = tokens + later
        return (guessed * min(held, self.budget) + (dims.layers - guessed) * held) / dims.layers

    def bus_bytes(self, dims: Dims, tokens: int) -> int:
        guessed = dims.layers_from(self.dense_layers)
        return 2 * guessed * dims.lists(self.reduce) * min(tokens, self.budget) * dims.head_dim * dims.element_bytes

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        guessed = dims.layers_from(self.dense_layers)
        dense_bytes = 2 * dims.width * dims.element_bytes
        skew = dims.head_dim * dims.kv_heads * self.most_columns(dims.head_dim) * dims.element_bytes
        partial = tokens * dims.kv_heads * self.most_columns(dims.head_dim) * dims.element_bytes
        return {
            "keys and values": Bytes((dims.layers - guessed) * tokens * dense_bytes, guessed * tokens * dense_bytes),
            "partial keys": Bytes(guessed * (partial + skew), 0),
        }

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        return 2 * dims.lists(self.reduce) * min(tokens, self.budget) * dims.head_dim * dims.element_bytes

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        # Attention reads here what has come over the bus.
        return self.prompt_bytes(dims, tokens).device + self.bus_bytes(dims, tokens)

    def step_flop(self, dims: Dims, tokens: int) -> int:
        guessed = dims.layers_from(self.dense_layers)
        guess = 2 * guessed * dims.q_heads * tokens * self.most_columns(dims.head_dim)
        return super().step_flop(dims, tokens) + guess

    def with_budget(self, tokens: int) -> Method:
        # How many tokens are near enough to the best one depends on the text: at a given number, the cap decides alone.
        return replace(self, budget=tokens, alpha=math.inf)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return replace(self, budget=tokens + 1, alpha=math.inf, dense_layers=1)


class _InfiniGenCache(DecodeCache):
    def __init__(self, method: InfiniGen) -> None:
        self._method = method
        self._dense: dict[int, DenseLayer] = {}
        self._guessed: dict[int, list[_GuessedRow]] = {}
        self._guess: Guess | None = None

    def ingest(self, layer: int, kv: LayerKV) -> None:
        if layer < self._method.dense_layers:
            self._dense[layer] = DenseLayer(kv.k, kv.v)
            return
        rows = zip(kv.k.split(1), kv.v.split(1), kv.q_tail.split(1), strict=True)
        given = None if self._method.skew is None else self._method.rotations[layer]
        self._guessed[layer] = [_GuessedRow(self._method, given, *row) for row in rows]

    def foresee(self, guess: Guess) -> None:
        self._guess = guess

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        if layer in self._dense:
            return self._dense[layer].attend(q, k, v, scaling)
        assert self._guess is not None
        batch = zip(self._guessed[layer], *(x.split(1) for x in (q, k, v, self._guess(layer))), strict=True)
        return torch.cat([row.attend(*new, scaling) for row, *new in batch])

    def nbytes(self) -> Bytes:
        dense = sum((state.nbytes() for state in self._dense.values()), Bytes(0, 0))
        return sum((row.nbytes() for rows in self._guessed.values() for row in rows), dense)

    def close(self) -> None:
        self._dense.clear()
        self._guessed.clear()


class _GuessedRow:
    """One layer of one prompt: rows of a batch differ in how many tokens they read."""

    def __init__(self, method: InfiniGen, given: Tensor | None, k: Tensor, v: Tensor, q_tail: Tensor) -> None:
        self._alpha, self._cap = method.alpha, method.budget - 1
        self._reduce = ops.GROUP_REDUCTIONS[method.reduce]
        turned = rotation(q_tail, k) if given is None else given.to(k.device)[None]
        columns = telling_columns(q_tail, k, turned, method.columns(k.shape[3]))[0]
        # Heads differ in how many channels they keep: theirs stand side by side, [1,n,sum of them].
        self._skews = [head[:, kept].to(k.dtype) for head, kept in zip(turned[0], columns, strict=True)]
        self._partial = TokenBuffer(self._project(k), axis=1)
        self._k, self._v = CodedTokens(k), CodedTokens(v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, guess: Tensor, scaling: float) -> Tensor:
        steps = zip(q.split(1, dim=2), k.split(1, dim=2), v.split(1, dim=2), guess.split(1, dim=2), strict=True)
        return torch.cat([self._step(*step, scaling) for step in steps], dim=2)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, guess: Tensor, scaling: float) -> Tensor:
        chosen = self._choose(guess, scaling)
        batch, heads, lists, count = chosen.shape

        def fetch(host: CodedTokens) -> Tensor:
            # To `attend`, every list is a KV head of its own.
            return host.gather(chosen.flatten(2)).view(batch, heads * lists, count, q.shape[3])

        newest = k.repeat_interleave(lists, dim=1), v.repeat_interleave(lists, dim=1)
        out = ops.attend(q, [(fetch(self._k), fetch(self._v)), newest], scaling)
        self._k.append(k)
        self._v.append(v)
        self._partial.append(self._project(k))
        return out

    def _project(self, k: Tensor) -> Tensor:
        """The kept channels of all heads. [1,H,n,D] -> [1,n,sum of channels]."""
        return torch.cat([k[:, head] @ skew for head, skew in enumerate(self._skews)], dim=-1)

    @ranged("selection")
    def _choose(self, guess: Tensor, scaling: float) -> Tensor:
        """The tokens to read, for each list of a KV head. guess [1,Hq,1,D] -> [1,H,L,s]."""
        partial = self._partial.view.split([skew.shape[1] for skew in self._skews], dim=-1)
        grouped = guess.reshape(1, len(self._skews), -1, guess.shape[3]).unbind(dim=1)
        by_head = zip(grouped, self._skews, partial, strict=True)
        scores = torch.stack([(q @ skew) @ keys.mT for q, skew, keys in by_head], dim=1).float() * scaling
        near = scores > scores.amax(dim=-1, keepdim=True) - self._alpha
        count = int(near.sum(dim=-1).double().mean())
        return ops.top_indices(self._reduce(scores), min(max(count, 1), self._cap))

    def nbytes(self) -> Bytes:
        partial = self._partial.nbytes() + sum(skew.nbytes for skew in self._skews)
        return Bytes(partial, 0) + self._k.nbytes() + self._v.nbytes()


def rotation(queries: Tensor, keys: Tensor) -> Tensor:
    """Right singular vectors of the queries of each KV head's group: fp32 [B,H,D,D], in columns, rising.

    queries [B,Hq,n,D], keys [B,H,m,D]. Together they are a rotation, which changes no product of a query and a key.
    Directions that no query has (fewer queries than channels) are the singular vectors of the keys there.
    """
    batch, heads, _, head_dim = keys.shape
    stacked = queries.reshape(batch, heads, -1, head_dim).double()
    of_queries, of_keys = stacked.mT @ stacked, _gram(keys)
    sizes = [x.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None] for x in (of_queries, of_keys)]
    vectors: Tensor = torch.linalg.eigh(of_queries + _TIE_BREAK * sizes[0] / sizes[1] * of_keys).eigenvectors
    return vectors.float()


def _gram(keys: Tensor) -> Tensor:
    """[B,H,m,D] -> fp64 [B,H,D,D]."""
    blocks = (block.double() for block in keys.split(_BLOCK_TOKENS, dim=2))
    return torch.stack([block.mT @ block for block in blocks]).sum(dim=0)


def telling_columns(queries: Tensor, keys: Tensor, rotation: Tensor, count: int) -> Tensor:
    """The columns a of a rotation that are among the `count` largest by the sum of |q a|, or of |k a|.

    queries [B,Hq,n,D], keys [B,H,m,D], rotation [B,H,D,D] -> bool [B,H,D].
    """
    batch, _, _, head_dim = queries.shape
    grouped = queries.float().reshape(batch, rotation.shape[1], -1, head_dim)
    by_queries = (grouped @ rotation).abs().sum(dim=2)
    blocks = keys.split(_BLOCK_TOKENS, dim=2)
    by_keys = torch.stack([(block.float() @ rotation).abs().sum(dim=2) for block in blocks]).sum(dim=0)
    return ops.top_mask(by_queries, count) | ops.top_mask(by_keys, count)
