"""The dense cache of a prefill: attention is exact; all keys and values and the last, or all, queries are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from shadowkv.anatomy.attention import dense_attention, with_handle
from shadowkv.common.dims import KVLayer
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import OBSERVED_QUERIES, LayerKV
from shadowkv.contract.sparse_prefill import SparsePrefill
from shadowkv.tensors.pinned import HostRows

# (q [B,Hq,T,D], k and v [B,H,n,D], scaling) -> [B,Hq,T,D], the queries being of the last T tokens.
SparseAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class RecordedLayer(Protocol):
    """One layer of a prompt, wherever its keys and values come from."""

    @property
    def window(self) -> int | None:
        """The sliding window, None for a layer that sees everything."""

    @property
    def served(self) -> bool:
        """Whether a method keeps it in its own way: see `KVLayer.served`."""

    @property
    def tokens(self) -> int: ...

    def layer_kv(self, row: int | None, skip_tokens: int) -> LayerKV:
        """Keys, values and queries on the model's device: see `RecordingLayer.layer_kv`."""


class Recorded(Protocol):
    """A prompt, layer by layer."""

    @property
    def recorded(self) -> Sequence[RecordedLayer]: ...


@dataclass(frozen=True)
class _PlacedLayer:
    """A layer of a prompt that will be a row of a batch."""

    layer: RecordedLayer
    host_rows: HostRows

    @property
    def window(self) -> int | None:
        return self.layer.window

    @property
    def served(self) -> bool:
        return self.layer.served

    @property
    def tokens(self) -> int:
        return self.layer.tokens

    def layer_kv(self, row: int | None, skip_tokens: int) -> LayerKV:
        return self.layer.layer_kv(row, skip_tokens)._replace(host_rows=self.host_rows)


@dataclass(frozen=True)
class _Placed:
    recorded: Sequence[RecordedLayer]


def placed(prompt: Recorded, host_rows: HostRows | None) -> Recorded:
    """The prompt, its layers told of their places on the host where there are any."""
    if host_rows is None:
        return prompt
    return _Placed([_PlacedLayer(layer, host_rows) for layer in prompt.recorded])


class RecordingLayer(CacheLayerMixin):
    """Attention during prefill, dense unless told otherwise; keeps keys and values and the last, or all, queries."""

    def __init__(self, layer: KVLayer, sparse: SparseAttention | None = None, record_queries: bool = False) -> None:
        super().__init__()
        self._sparse = sparse
        self.served = layer.served
        self.window = layer.window
        self.is_sliding = self.window is not None
        self.sliding_window = self.window  # read by transformers where is_sliding is set
        self.tokens = 0
        self.scaling = 1.0
        self.padding: list[int] | None = None  # left padding per row, where a mask told
        self._record_queries = record_queries and self.served
        self._q_tail: Tensor | None = None
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._reserved_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def reserve(self, tokens: int) -> None:
        """Make room for prompts of up to `tokens`; without it the buffers grow by copying."""
        self._reserved_tokens = tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.tokens, self.tokens + key_states.shape[2]
        self._keys = keys = self._with_room(self._keys, key_states, end)
        self._values = values = self._with_room(self._values, value_states, end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.tokens = end
        visible = slice(self._hidden_tokens(start), end)
        return with_handle(keys[:, :, visible], self), values[:, :, visible]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        self.scaling = scaling
        if mask is not None and self.window is None and self.padding is None:
            # The last query sees everything but padding, so its first visible column tells how much there is.
            seen = mask[:, 0, -1].int()
            first = seen.argmax(dim=-1)
            if not bool((first + seen.sum(dim=-1) == seen.shape[-1]).all()):
                raise SkvError("a method's cache takes padding on the left of a prompt only: padding_side='left'")
            self.padding = first.expand(q.shape[0]).tolist()
        recent = q if self._q_tail is None else torch.cat((self._q_tail, q), dim=2)
        self._q_tail = recent[:, :, -OBSERVED_QUERIES:].clone()
        if self._record_queries:
            start = self.tokens - q.shape[2]
            self._queries = queries = self._with_room(self._queries, q, self.tokens)
            queries[:, :, start : self.tokens] = q
        if self._sparse is None:
            return dense_attention(q, k, v, mask, scaling)
        if self.padding is not None and any(self.padding):
            raise SkvError(
                "a sparse prefill takes prompts of one length: leave out the padding, or one prompt at a time"
            )
        return self._sparse(q, k, v, scaling)

    def layer_kv(self, row: int | None, skip_tokens: int) -> LayerKV:
        """What was recorded, as views; of one row without its `skip_tokens` of left padding, or of all rows."""
        assert self._q_tail is not None
        assert self._keys is not None
        assert self._values is not None
        rows = slice(None) if row is None else slice(row, row + 1)
        keys, values = (x[rows, :, skip_tokens : self.tokens] for x in (self._keys, self._values))
        q_all = None if self._queries is None else self._queries[rows, :, skip_tokens : self.tokens]
        return LayerKV(keys, values, self._q_tail[rows, :, -keys.shape[2] :], self.scaling, q_all)

    def nbytes(self) -> int:
        """Bytes of the tokens recorded, room for more included."""
        held = (self._keys, self._values, self._queries, self._q_tail)
        return sum(x.nbytes for x in held if x is not None)

    def let_go(self) -> None:
        """Keep nothing of what was recorded; views of it stay."""
        self._keys = self._values = self._queries = self._q_tail = None

    def rewind(self, tokens: int) -> None:
        """Forget everything after the first `tokens`; the buffers stay and are written over."""
        self.tokens = tokens
        self._q_tail = None

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self.mask_sizes(self.tokens, query_length)

    def mask_sizes(self, start: int, query_length: int | Tensor) -> tuple[int, int]:
        """Columns of the mask of queries from position `start` on, and the token of the first one."""
        hidden = self._hidden_tokens(start)
        return start + count_queries(query_length) - hidden, hidden

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def _hidden_tokens(self, start: int) -> int:
        """Tokens that no query from position `start` on can see."""
        return 0 if self.window is None else max(start - self.window + 1, 0)

    def _with_room(self, held: Tensor | None, new: Tensor, tokens: int) -> Tensor:
        """`held`, or a larger copy of it, with space for `tokens` tokens shaped like `new`."""
        if held is not None and tokens <= held.shape[2]:
            return held
        grown = new.new_empty((*new.shape[:2], max(tokens, self._reserved_tokens), new.shape[3]))
        if held is not None:
            grown[:, :, : held.shape[2]] = held
        return grown


class Recording(Cache):
    """The cache of a prefill in progress: dense or, in the layers that methods serve, by `sparse`.

    With `record_queries` it is as good for any method.
    """

    def __init__(
        self, layers: Sequence[KVLayer], sparse: SparsePrefill | None = None, record_queries: bool = False
    ) -> None:
        chosen = [partial(sparse.attention, i) if sparse and layer.served else None for i, layer in enumerate(layers)]
        super().__init__(layers=[RecordingLayer(*of, record_queries) for of in zip(layers, chosen, strict=True)])

    @property
    def recorded(self) -> list[RecordingLayer]:
        return cast("list[RecordingLayer]", self.layers)

    @property
    def padding(self) -> list[int] | None:
        """Left padding per row, or None if no row has any."""
        told = next((layer.padding for layer in self.recorded if layer.padding), None)
        return told if told and any(told) else None


def count_queries(query: int | Tensor) -> int:
    """transformers 5.2 hands over cache positions where later versions hand over their number."""
    return query if isinstance(query, int) else int(query.shape[0])
