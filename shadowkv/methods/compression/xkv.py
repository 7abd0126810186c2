"""xKV: neighbouring layers share the token side of a low-rank factorisation of their keys, and of their values.

Paper: https://arxiv.org/abs/2503.18893. Known differences from the authors' code:
- the factorisation is by the Gram matrix in fp64 instead of an SVD;
- ranks are shares of a group's width where none are given: an eighth for keys and three sixteenths for values, the 512
  and 768 of 4096 that theirs take for four layers of Llama-3.1-8B;
- groups are of consecutive layers that the method serves; a last, smaller group has its ranks scaled down with it;
- without `select`, a step rebuilds all keys of a layer; values are never rebuilt, since attention can weigh their
  coefficients. There is no fused kernel, so decoding is slower than full attention, while the bytes held are those of
  the factors;
- with it, a step rebuilds the keys and values of chunks that ShadowKV would choose (their selective reconstruction).
  Outliers and local chunks are kept exact beside the factors, which hold them too;
- generated tokens are kept exact, as theirs are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.layerwise import LayeredCache, LayerState, StepwiseState
from shadowkv.contract.method import DecodeCache, LayerKV, Method, largest_within, require_rotary
from shadowkv.contract.setting import require
from shadowkv.methods.shadowkv.landmarks import Landmarks, SelectsChunks
from shadowkv.tensors import low_rank, ops
from shadowkv.tensors.buffers import TokenBuffer

_SHARE_K, _SHARE_V = 1 / 8, 3 / 16  # of a group's width


@dataclass(frozen=True)
class XKV(SelectsChunks):
    """group: consecutive layers that share factors · rank_k, rank_v: directions kept of a group's keys (auto: 1/8 of
    its width), values (auto: 3/16) · select: read a few chunks per step instead of everything; then budget, chunk,
    local, outliers as for shadowkv."""

    name: ClassVar[str] = "xkv"
    summary: ClassVar[str] = "keys and values in low-rank factors shared by neighbouring layers"
    paper: ClassVar[str] = "2503.18893"
    compared: ClassVar[str | None] = "abdelfattah-lab/xKV@bfe5d720, 2026-11-25: same keys and values"

    group: int = 4
    rank_k: int | None = None
    rank_v: int | None = None
    select: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.group >= 1, f"xkv: group must be at least 1, got {self.group}")
        for name, rank in (("rank_k", self.rank_k), ("rank_v", self.rank_v)):
            require(rank is None or rank >= 1, f"xkv: {name} must be at least 1, got {rank}")

    def check(self, dims: Dims) -> None:
        require_rotary(dims, self.name)
        width = self.group * dims.width
        for name, rank in (("rank_k", self.rank_k), ("rank_v", self.rank_v)):
            require(
                rank is None or rank <= width,
                f"xkv: {name}={rank} exceeds the width of {self.group} layers of this model, {width}; "
                f"give {name}={width} or less",
            )

    def ranks(self, width: int, layers: int) -> tuple[int, int]:
        """Directions kept of the keys and values of `layers` layers of this width each: a smaller last group gets its
        share."""
        whole = self.group * width
        ranks = (
            max(round(whole * share), 1) if rank is None else rank
            for rank, share in ((self.rank_k, _SHARE_K), (self.rank_v, _SHARE_V))
        )
        rank_k, rank_v = (-(-rank * layers // self.group) for rank in ranks)
        return rank_k, rank_v

    def new_state(self, rope: Rope) -> DecodeCache:
        return _XKVCache(self, rope)

    def new_layer(self, layer: int, kv: LayerKV, factors: LayerFactors, rope: Rope) -> LayerState:
        """What one layer needs beside the factors that its group shares."""
        kind = _ChosenLayer if self.select else _WholeLayer
        return kind(self, layer, kv, factors, rope)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        landmarks = self._landmark_bytes(dims) // self.chunk if self.select else 0
        return Bytes(self._ranks_per_token(dims) * dims.element_bytes + landmarks, 0)

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        parts = {
            "coefficients": Bytes(tokens * self._ranks_per_token(dims) * dims.element_bytes, 0),
            "directions": Bytes(self._ranks_of_layers(dims) * dims.width * dims.element_bytes, 0),
        }
        if self.select:
            parts["landmarks"] = Bytes(self.landmarks(tokens) * self._landmark_bytes(dims), 0)
            parts["outlier and local tokens"] = Bytes(self.exact_tokens(tokens) * dims.full_bytes_per_token, 0)
        return parts

    def _ranks_per_token(self, dims: Dims) -> int:
        return sum(sum(self.ranks(dims.width, size)) for size in self._groups(dims))

    def _ranks_of_layers(self, dims: Dims) -> int:
        """Summed over layers, the directions of keys and values that each one has a share of."""
        return sum(size * sum(self.ranks(dims.width, size)) for size in self._groups(dims))

    def _landmark_bytes(self, dims: Dims) -> int:
        """One landmark of every layer, and the numbers of its chunk."""
        return dims.layers * (dims.width * dims.element_bytes + dims.kv_heads * 4)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        read = self.chosen_tokens(tokens) + self.exact_tokens(tokens) if self.select else tokens
        return min(read, tokens) + later

    def with_budget(self, tokens: int) -> Method | None:
        return self.within_budget(tokens) if self.select else None

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        # Values are rebuilt only where chunks are chosen.
        rebuilt = 2 * self.chosen_tokens(tokens) if self.select else tokens
        return rebuilt * dims.width * dims.element_bytes

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        parts = self.memory_parts(dims, tokens)
        directions = parts["directions"].device
        # Every layer of a group reads the group's coefficients for itself, and its own share of the directions.
        ranks = self._ranks_of_layers(dims)
        if not self.select:
            return tokens * ranks * dims.element_bytes + directions
        rows = dims.kv_heads * self.chosen_tokens(tokens) * ranks * dims.element_bytes
        return rows + directions + parts["landmarks"].device + parts["outlier and local tokens"].device

    def step_flop(self, dims: Dims, tokens: int) -> int:
        flop = 0
        for size in self._groups(dims):
            rank_k, rank_v = self.ranks(dims.width, size)
            if self.select:
                rebuilt = dims.kv_heads * self.chosen_tokens(tokens) * (rank_k + rank_v) * dims.head_dim
                scored = dims.q_heads * self.landmarks(tokens) * dims.head_dim
                read = 2 * dims.q_heads * round(self.attended_tokens(dims, tokens)) * dims.head_dim
                flop += 2 * size * (rebuilt + scored + read)
            else:
                rebuilt = dims.kv_heads * tokens * rank_k * dims.head_dim
                scored = dims.q_heads * tokens * dims.head_dim
                weighed = dims.q_heads * (tokens * rank_v + rank_v * dims.head_dim)
                flop += 2 * size * (rebuilt + scored + weighed)
        return flop

    def _groups(self, dims: Dims) -> list[int]:
        """How many layers each group has."""
        whole, rest = divmod(dims.layers, self.group)
        return [self.group] * whole + [rest] * (rest > 0)

    def with_kv_bytes(self, dims: Dims, tokens: int, kv_bytes: int) -> Method:
        # Keys and values keep the proportion of their ranks.
        given = self.ranks(dims.width, self.group)

        def of(rank: int) -> Method:
            rank_k, rank_v = (max(rank * own // max(given), 1) for own in given)
            return replace(self, rank_k=rank_k, rank_v=rank_v)

        return largest_within(of, 1, self.group * dims.width, dims, tokens, kv_bytes)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        whole = self.group * dims.width
        budget = -(-max(tokens, 1) // self.chunk) * self.chunk
        return replace(self, rank_k=whole, rank_v=whole, budget=budget)


class LayerFactors(NamedTuple):
    """One layer's view of the factors of its group."""

    keys: low_rank.SharedFactors  # before RoPE
    values: low_rank.SharedFactors
    place: int  # of the layer in the group


class _WholeLayer(LayerState):
    """Every token is read: keys are rebuilt, values weighed by their coefficients. Factors are counted elsewhere."""

    def __init__(self, method: XKV, layer: int, kv: LayerKV, factors: LayerFactors, rope: Rope) -> None:
        self._layer, self._rope, self._factors = layer, rope, factors
        self._prompt_tokens = kv.k.shape[2]
        self._new_k, self._new_v = (TokenBuffer(x[:, :, :0].clone(), axis=2) for x in (kv.k, kv.v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._new_k.append(k)
        self._new_v.append(v)
        place = self._factors.place
        keys = self._factors.keys.rebuild(place, k.shape[1])
        positions = torch.arange(self._prompt_tokens, device=keys.device)
        keys = self._rope.rotate(self._layer, keys, positions, self._prompt_tokens + len(self._new_k))
        of_prompt, of_new = ops.segment_weights(q, (keys, self._new_k.view), scaling)
        return (self._factors.values.weigh(of_prompt, place) + of_new @ self._new_v.view).view_as(q)

    def nbytes(self) -> Bytes:
        return Bytes(self._new_k.nbytes() + self._new_v.nbytes(), 0)


class _ChosenLayer(StepwiseState):
    """Chunks are chosen by their landmarks and rebuilt; outliers, local chunks and new tokens are exact."""

    def __init__(self, method: XKV, layer: int, kv: LayerKV, factors: LayerFactors, rope: Rope) -> None:
        self._layer, self._rope, self._factors = layer, rope, factors
        self._chunks_read = method.budget // method.chunk
        self._tokens = kv.k.shape[2]
        context = method.context_tokens(self._tokens)
        self._landmarks, outliers = Landmarks.of(kv.k[:, :, :context], method.chunk, method.outlier_chunks)
        self._outliers = ops.gather_tokens(kv.k, outliers), ops.gather_tokens(kv.v, outliers)
        # Copies, because slices of the whole prompt would keep it alive.
        self._tail_k, self._tail_v = (TokenBuffer(x[:, :, context:].clone(), axis=2) for x in (kv.k, kv.v))

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._tail_k.append(k)
        self._tail_v.append(v)
        self._tokens += 1
        exact = [self._outliers, (self._tail_k.view, self._tail_v.view)]
        if not len(self._landmarks):
            return ops.attend(q, exact, scaling)
        index = self._landmarks.choose(q, self._chunks_read, scaling)
        keys, values = (part.rebuild_at(self._factors.place, index) for part in self._factors[:2])
        keys = self._rope.rotate(self._layer, keys, index, self._tokens)
        return ops.attend(q, [(keys, values), *exact], scaling)

    def nbytes(self) -> Bytes:
        exact = sum(x.nbytes for x in self._outliers) + self._tail_k.nbytes() + self._tail_v.nbytes()
        return Bytes(self._landmarks.nbytes() + exact, 0)


class _XKVCache(LayeredCache):
    def __init__(self, method: XKV, rope: Rope) -> None:
        super().__init__()
        self._method, self._rope = method, rope
        self._prompt: dict[int, LayerKV] = {}  # layers whose group is not full yet
        self._groups: list[tuple[low_rank.SharedFactors, low_rank.SharedFactors]] = []

    def ingest(self, layer: int, kv: LayerKV) -> None:
        self._prompt[layer] = kv
        if len(self._prompt) == self._method.group:
            self._factorise()

    def complete(self) -> None:
        if self._prompt:
            self._factorise()

    def _factorise(self) -> None:
        """Put the factors of the dense layers held in their place."""
        layers = len(self._prompt)
        keys = [self._pre_rope(layer, kv.k) for layer, kv in self._prompt.items()]
        values = [kv.v for kv in self._prompt.values()]
        width = values[0].shape[1] * values[0].shape[3]
        rank_k, rank_v = self._method.ranks(width, layers)
        dtype = values[0].dtype
        group = low_rank.share(keys, rank_k, dtype), low_rank.share(values, rank_v, dtype)
        self._groups.append(group)
        for place, (layer, kv) in enumerate(self._prompt.items()):
            self.layers[layer] = self._method.new_layer(layer, kv, LayerFactors(*group, place), self._rope)
        self._prompt.clear()

    def _pre_rope(self, layer: int, k: Tensor) -> Tensor:
        positions = torch.arange(k.shape[2], device=k.device)
        return self._rope.unrotate(layer, k, positions, k.shape[2])

    def nbytes(self) -> Bytes:
        return Bytes(sum(part.nbytes for group in self._groups for part in group), 0) + super().nbytes()

    def close(self) -> None:
        self._prompt.clear()
        self._groups.clear()
        super().close()
