"""MInference: a prefill in which each head reads a few columns, diagonals or blocks of its attention map.

Paper: https://arxiv.org/abs/2407.02490. Known differences from the authors' code:
- what a head reads is estimated for each chunk of the prefill from the last queries of that chunk, not once from
  those of the whole prompt: later tokens influence nothing before them, and prefixes can be shared. With a chunk as
  long as the prompt (`--prefill-chunk`), or in `model.generate`, it is the authors' estimate;
- the diagonals of a block of 64 queries are those of any of its rows. Their kernel reads further keys where it makes up
  whole blocks of 64, at the first token and where diagonals overlap;
- of fewer than 100 diagonals, which are all among the nearest 100, those are read that are nearest; theirs takes any;
- block-sparse always reads the block of the query itself, and a last, shorter block is the mean of its own tokens;
- without a table (`heads=FILE`, in the authors' format) all heads have the same shape;
- plain torch, one head and one block of queries at a time: memory and products are those of a sparse prefill, times
  are not those of a kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowkv.common.dims import Dims
from shadowkv.common.errors import SkvError
from shadowkv.common.reading import read_text
from shadowkv.contract.setting import require
from shadowkv.contract.sparse_prefill import SparsePrefill
from shadowkv.tensors import ops

_BLOCK_TOKENS = 64  # queries that share what they read; also the queries that estimates are made from
_FIRST_COLUMNS, _NEAR_DIAGONALS = 30, 100  # read before any other, whatever the estimate
_FEWEST_COLUMNS, _FEWEST_DIAGONALS = 30, 50  # read even where fewer are asked for

# (first, last) position of a block of queries -> which of the tokens 0 .. last it reads, bool [last + 1]; or each of
# the queries, bool [last + 1 - first, last + 1].
_Reads = Callable[[int, int], Tensor]


class _Shape(NamedTuple):
    """One head's pattern: a, b are columns and diagonals, sinks and newest tokens, or blocks and nothing."""

    pattern: str
    a: int
    b: int = 0


@dataclass(frozen=True)
class MInference(SparsePrefill):
    """pattern: vertical_slash, a_shape or block_sparse · vertical, slash: columns and diagonals, at least 30 and 50 ·
    sinks, local: first and newest tokens of an A-shape · blocks: blocks of 64 keys · heads: file of patterns by head
    (auto: all alike)."""

    name: ClassVar[str] = "minference"
    summary: ClassVar[str] = "sparse prefill: columns and diagonals, A-shape or blocks per head"
    paper: ClassVar[str] = "2407.02490"
    compared: ClassVar[str | None] = "microsoft/MInference@fb56c91, 2026-11-25: the same columns, diagonals and blocks"

    pattern: str = "vertical_slash"
    vertical: int = 1000
    slash: int = 6096
    sinks: int = 128
    local: int = 4096
    blocks: int = 100
    heads: str | None = None

    def __post_init__(self) -> None:
        require(
            self.pattern in _PATTERNS,
            f"minference: pattern={self.pattern} is unknown; one of {', '.join(_PATTERNS)}",
        )
        for key in ("vertical", "slash", "sinks", "local", "blocks"):
            require(getattr(self, key) >= 1, f"minference: {key} must be at least 1, got {getattr(self, key)}")

    def files(self) -> dict[str, Path]:
        return {} if self.heads is None else {"heads": Path(self.heads).expanduser()}

    def check(self, dims: Dims) -> None:
        if self.heads is None:
            return
        missing = [
            f"layer {layer} head {head}"
            for layer, head in product(dims.layer_ids, range(dims.q_heads))
            if (layer, head) not in self._table
        ]
        require(not missing, f"minference: heads={self.heads} has no pattern for {', '.join(missing[:2])}")

    def lossless(self, tokens: int) -> SparsePrefill:
        return replace(self, pattern="vertical_slash", vertical=max(tokens, 1), heads=None)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        out = torch.empty_like(q)
        groups = q.shape[1] // k.shape[1]
        for row, head in product(range(q.shape[0]), range(q.shape[1])):
            shape = self._shape(layer, head)
            kv_head = head // groups
            out[row, head] = _attend(shape, q[row, head], k[row, kv_head], v[row, kv_head], scaling)
        return out

    def _shape(self, layer: int, head: int) -> _Shape:
        if self.heads is not None:
            return self._table[layer, head]
        return {
            "vertical_slash": _Shape(self.pattern, self.vertical, self.slash),
            "a_shape": _Shape(self.pattern, self.sinks, self.local),
            "block_sparse": _Shape(self.pattern, self.blocks),
        }[self.pattern]

    @cached_property
    def _table(self) -> dict[tuple[int, int], _Shape]:
        """Patterns by (layer, query head): a JSON list, by layer, of {"head": [pattern, a, b, ...]}."""
        assert self.heads is not None
        try:
            layers = json.loads(read_text(Path(self.heads).expanduser(), f"minference: heads={self.heads}"))
            return {
                (layer, int(head)): _Shape(_THEIR_NAMES[entry[0]], max(int(entry[1]), 1), int(entry[2]))
                for layer, by_head in enumerate(layers)
                for head, entry in by_head.items()
            }
        except OSError as error:
            raise SkvError(f"minference: cannot read heads={self.heads}: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise SkvError(f"minference: heads={self.heads} is not a table of patterns by layer and head") from error


def _attend(shape: _Shape, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """One head. q [T,D] of the last T tokens of k, v [n,D] -> [T,D]; at most a block of rows is scored at a time."""
    reads = _PATTERNS[shape.pattern](shape, q, k, scaling)
    begin = k.shape[0] - q.shape[0]
    outs = []
    for start, rows in zip(range(begin, k.shape[0], _BLOCK_TOKENS), q.split(_BLOCK_TOKENS), strict=True):
        positions = torch.arange(start, start + len(rows), device=q.device)
        read = reads(start, start + len(rows) - 1).expand(len(rows), -1)
        keys = read.any(dim=0).nonzero()[:, 0]
        seen = read[:, keys] & (keys <= positions[:, None])
        outs.append(F.scaled_dot_product_attention(rows[None], k[None, keys], v[None, keys], seen[None], scale=scaling))
    return torch.cat(outs, dim=1)[0]


def _vertical_slash(shape: _Shape, q: Tensor, k: Tensor, scaling: float) -> _Reads:
    """The columns and diagonals that hold most of the last queries' attention."""
    tokens, tail = k.shape[0], q[-_BLOCK_TOKENS:]
    key = torch.arange(tokens, device=q.device)
    offset = torch.arange(tokens - len(tail), tokens, device=q.device)[:, None] - key
    weights = ((tail @ k.T).float() * scaling).masked_fill(offset < 0, float("-inf")).softmax(dim=-1)
    columns = weights.sum(dim=0)
    # What a query sees at a distance of d is what the key at its position minus d gets.
    diagonals = weights.gather(1, offset.clamp(min=0)).masked_fill(offset < 0, 0).sum(dim=0)
    columns[:_FIRST_COLUMNS], diagonals[:_NEAR_DIAGONALS] = float("inf"), float("inf")
    best_columns = ops.top_indices(columns, max(shape.a, _FEWEST_COLUMNS))
    return _lines(tokens, best_columns, ops.top_indices(diagonals, max(shape.b, _FEWEST_DIAGONALS)))


def _a_shape(shape: _Shape, q: Tensor, k: Tensor, scaling: float) -> _Reads:
    """The first tokens and each query's newest ones."""

    def reads(first: int, last: int) -> Tensor:
        key, position = torch.arange(last + 1, device=q.device), torch.arange(first, last + 1, device=q.device)
        return (key < shape.a) | (position[:, None] - key < max(shape.b, 1))

    return reads


def _lines(tokens: int, columns: Tensor, diagonals: Tensor) -> _Reads:
    """Columns, and diagonals by their distance; a block of queries reads the diagonals of all its rows."""
    is_column = torch.zeros(tokens, dtype=torch.bool, device=columns.device).index_fill_(0, columns, True)
    on_diagonal = torch.zeros(tokens + 1, dtype=torch.long, device=columns.device).index_fill_(0, diagonals + 1, 1)
    nearer = on_diagonal.cumsum(dim=0)  # [d]: diagonals at a distance below d

    def reads(first: int, last: int) -> Tensor:
        key = torch.arange(last + 1, device=columns.device)
        return is_column[: last + 1] | (nearer[last - key + 1] > nearer[(first - key).clamp(min=0)])

    return reads


def _block_sparse(shape: _Shape, q: Tensor, k: Tensor, scaling: float) -> _Reads:
    """The blocks of keys whose means are most like the mean of the block of queries."""
    means = torch.stack([block.float().mean(dim=0) for block in k.split(_BLOCK_TOKENS)])
    begin = k.shape[0] - q.shape[0]

    def reads(first: int, last: int) -> Tensor:
        scores = means[: last // _BLOCK_TOKENS + 1] @ q[first - begin : last + 1 - begin].float().mean(dim=0)
        scores[first // _BLOCK_TOKENS :] = float("inf")  # its own
        own = len(scores) - first // _BLOCK_TOKENS
        chosen = ops.top_indices(scores, max(shape.a, own))
        read = torch.zeros(len(scores), dtype=torch.bool, device=q.device).index_fill_(0, chosen, True)
        return read.repeat_interleave(_BLOCK_TOKENS)[: last + 1]

    return reads


_PATTERNS: dict[str, Callable[[_Shape, Tensor, Tensor, float], _Reads]] = {
    "vertical_slash": _vertical_slash,
    "a_shape": _a_shape,
    "block_sparse": _block_sparse,
}
_THEIR_NAMES = {
    "vertical_and_slash": "vertical_slash",
    "stream_llm": "a_shape",
    **{name: name for name in _PATTERNS},
}
