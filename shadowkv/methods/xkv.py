"""xKV: neighbouring layers share the token side of a low-rank factorisation of their keys, and of their values.

Paper: https://arxiv.org/abs/2503.18893. Known differences from the authors' code:
- keys and values are centred before the factorisation, which is by the Gram matrix in fp64 instead of an SVD;
- groups are of consecutive layers that the method serves; a last, smaller group has its ranks scaled down with it;
- a step rebuilds all keys of a layer; values are never rebuilt, since attention can weigh their coefficients. There is
  no budget and no fused kernel, so decoding is slower than full attention, while the bytes held are those of the
  factors. Selective reconstruction (xKV-SR) is not part of this method;
- generated tokens are kept exact, as theirs are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shadowkv import low_rank, ops
from shadowkv.buffers import TokenBuffer
from shadowkv.method import Bytes, DecodeCache, Dims, LayerKV, Method, largest_within, require
from shadowkv.ranges import ranged
from shadowkv.rope import Rope


@dataclass(frozen=True)
class XKV(Method):
    """group: consecutive layers that share factors · rank_k, rank_v: directions kept of a group's keys, values."""

    name: ClassVar[str] = "xkv"
    summary: ClassVar[str] = "keys and values in low-rank factors shared by neighbouring layers"
    paper: ClassVar[str] = "2503.18893"

    group: int = 4
    rank_k: int = 384
    rank_v: int = 576

    def __post_init__(self) -> None:
        require(self.group >= 1, f"xkv: group must be at least 1, got {self.group}")
        require(self.rank_k >= 1, f"xkv: rank_k must be at least 1, got {self.rank_k}")
        require(self.rank_v >= 1, f"xkv: rank_v must be at least 1, got {self.rank_v}")

    def check(self, dims: Dims) -> None:
        width = self.group * dims.width
        for name, rank in (("rank_k", self.rank_k), ("rank_v", self.rank_v)):
            require(
                rank <= width,
                f"xkv: {name}={rank} exceeds the width of {self.group} layers of this model, {width}; "
                f"give {name}={width} or less",
            )

    def new_state(self, rope: Rope) -> DecodeCache:
        return _XKVCache(self, rope)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        whole, rest = divmod(dims.layers, self.group)
        ranks = whole * (self.rank_k + self.rank_v) + self.share(self.rank_k, rest) + self.share(self.rank_v, rest)
        return Bytes(ranks * dims.element_bytes, 0)

    def prompt_bytes(self, dims: Dims, tokens: int) -> Bytes:
        whole, rest = divmod(dims.layers, self.group)
        ranks = self.rank_k + self.rank_v
        directions = whole * (ranks + 2) * self.group  # and the means of keys and values
        if rest:
            directions += (self.share(self.rank_k, rest) + self.share(self.rank_v, rest) + 2) * rest
        coefficients = tokens * self.bytes_per_token(dims).device
        return Bytes(coefficients + directions * dims.width * dims.element_bytes, 0)

    def share(self, rank: int, layers: int) -> int:
        """The rank of a group of `layers` layers: a smaller last group gets its share."""
        return -(-rank * layers // self.group)

    def with_kv_bytes(self, dims: Dims, tokens: int, kv_bytes: int) -> Method:
        # Keys and values keep the proportion of their ranks.
        width, larger = self.group * dims.width, max(self.rank_k, self.rank_v)

        def of(rank: int) -> Method:
            rank_k, rank_v = (max(rank * own // larger, 1) for own in (self.rank_k, self.rank_v))
            return replace(self, rank_k=rank_k, rank_v=rank_v)

        return largest_within(of, 1, width, dims, tokens, kv_bytes)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return replace(self, rank_k=self.group * dims.width, rank_v=self.group * dims.width)


class _Factors(NamedTuple):
    """Keys or values of a group of layers: x ~ coefficients @ vectors + mean, layer after layer in the last axis."""

    coefficients: Tensor  # [B,n,r], shared by the layers
    vectors: Tensor  # [B,r,layers*W]
    mean: Tensor  # [B,1,layers*W]
    layers: int

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.coefficients, self.vectors, self.mean))

    @ranged("rebuild")
    def rebuild(self, place: int, heads: int) -> Tensor:
        """What the layer at `place` of the group had, [B,H,n,D]."""
        vectors, mean = self._of(place, heads)
        return self.coefficients[:, None] @ vectors + mean

    @ranged("attention")
    def weigh(self, weights: Tensor, place: int) -> Tensor:
        """weights @ rebuild(place), without rebuilding. weights [B,H,m,n] -> [B,H,m,D]."""
        vectors, mean = self._of(place, weights.shape[1])
        return (weights @ self.coefficients[:, None]) @ vectors + weights.sum(dim=-1, keepdim=True) * mean

    def _of(self, place: int, heads: int) -> tuple[Tensor, Tensor]:
        """Vectors [B,H,r,D] and mean [B,H,1,D] of one layer."""
        width = self.vectors.shape[2] // self.layers
        own = slice(place * width, (place + 1) * width)
        vectors, mean = (x[:, :, own].unflatten(2, (heads, -1)).transpose(1, 2) for x in (self.vectors, self.mean))
        return vectors, mean


class _Group(NamedTuple):
    keys: _Factors  # before RoPE
    values: _Factors


class _Member(NamedTuple):
    """One layer of a group, and its tokens that came after the prompt."""

    group: _Group
    place: int
    new_k: TokenBuffer
    new_v: TokenBuffer


class _XKVCache(DecodeCache):
    def __init__(self, method: XKV, rope: Rope) -> None:
        self._method, self._rope = method, rope
        self._prompt: dict[int, LayerKV] = {}  # layers whose group is not full yet
        self._groups: list[_Group] = []
        self._members: dict[int, _Member] = {}

    def ingest(self, layer: int, kv: LayerKV) -> None:
        self._prompt[layer] = kv
        if len(self._prompt) == self._method.group:
            self._factorise()

    def complete(self) -> None:
        if self._prompt:
            self._factorise()

    def _factorise(self) -> None:
        """Put the factors of the dense layers held in their place."""
        layers, share = len(self._prompt), self._method.share
        keys = [self._pre_rope(layer, kv.k) for layer, kv in self._prompt.items()]
        values = [kv.v for kv in self._prompt.values()]
        group = _Group(
            _factors(keys, share(self._method.rank_k, layers), values[0].dtype),
            _factors(values, share(self._method.rank_v, layers), values[0].dtype),
        )
        self._groups.append(group)
        for place, (layer, kv) in enumerate(self._prompt.items()):
            new_k, new_v = (TokenBuffer(x[:, :, :0], axis=2) for x in (kv.k, kv.v))
            self._members[layer] = _Member(group, place, new_k, new_v)
        self._prompt.clear()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        group, place, new_k, new_v = self._members[layer]
        new_k.append(k)
        new_v.append(v)
        keys = group.keys.rebuild(place, k.shape[1])
        prompt_tokens = keys.shape[2]
        positions = torch.arange(prompt_tokens, device=keys.device)
        keys = self._rope.rotate(layer, keys, positions, prompt_tokens + len(new_k))
        of_prompt, of_new = ops.segment_weights(q, (keys, new_k.view), scaling)
        return (group.values.weigh(of_prompt, place) + of_new @ new_v.view).view_as(q)

    def _pre_rope(self, layer: int, k: Tensor) -> Tensor:
        positions = torch.arange(k.shape[2], device=k.device)
        return self._rope.unrotate(layer, k, positions, k.shape[2])

    def nbytes(self) -> Bytes:
        factors = sum(part.nbytes for group in self._groups for part in group)
        new = sum(member.new_k.nbytes() + member.new_v.nbytes() for member in self._members.values())
        return Bytes(factors + new, 0)

    def close(self) -> None:
        self._prompt.clear()
        self._groups.clear()
        self._members.clear()


def _factors(layers: list[Tensor], rank: int, dtype: torch.dtype) -> _Factors:
    """The best factors of the layers side by side. layers [B,H,n,D] each."""
    side_by_side = torch.cat([x.float().transpose(1, 2).flatten(2) for x in layers], dim=2)
    basis = low_rank.fit(side_by_side, rank)
    coefficients = basis.project(side_by_side).to(dtype)
    return _Factors(coefficients, basis.vectors.to(dtype), basis.mean.to(dtype), len(layers))
