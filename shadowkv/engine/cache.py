"""How a method meets transformers: `Cache` subclasses that decode through a `DecodeCache`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from shadowkv.anatomy.attention import with_handle
from shadowkv.anatomy.foresight import Foresight
from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import DecodeCache, Method, depth_of
from shadowkv.engine.recording import Recorded, RecordedLayer, count_queries


class Share(NamedTuple):
    """A `DecodeCache` and how many rows of the batch are its own."""

    cache: DecodeCache
    rows: int


class MethodLayer(CacheLayerMixin):
    """Decoding through a method: one `DecodeCache` for all rows, or several for some rows each."""

    is_sliding = False

    def __init__(self, layer: int, shares: Sequence[Share], columns: int) -> None:
        super().__init__()
        self.is_initialized = True
        self._layer = layer
        self._shares = shares
        self.columns = columns  # tokens of the longest row, left padding included: what transformers counts from
        self.has_room = False  # whether `make_room` of every cache has been called for the token that comes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.columns += key_states.shape[2]
        return with_handle(key_states, self), value_states

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        sizes = [share.rows for share in self._shares]
        parts = []
        for share, own_q, own_k, own_v in zip(
            self._shares, q.split(sizes), k.split(sizes), v.split(sizes), strict=True
        ):
            attend = share.cache.run if self.has_room else share.cache.attend
            parts.append(attend(self._layer, own_q, own_k, own_v, scaling))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self.columns + count_queries(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class MethodCache(Cache):
    """A prompt as one method keeps it, ready for new tokens; layers that no method serves stay dense."""

    def __init__(
        self, model: PreTrainedModel, recording: Recorded, method: Method, rope: Rope, *, shared: bool = False
    ) -> None:
        super().__init__(layers=[])
        self._shares: list[Share] = []
        self.row_tokens: list[int] = []  # tokens that each row holds
        self.usable: Callable[[], bool] = lambda: True  # false once the prompt it shows views of was written over
        self._foresight = Foresight(model, self) if method.speculates else None
        self.begin(recording, method, rope, None, shared=shared)

    def begin(
        self, recording: Recorded, method: Method, rope: Rope, skip: list[int] | None, *, shared: bool = False
    ) -> None:
        """Hand every recorded layer to `method`. `skip` is the left padding per row, None for none."""
        rows: list[int | None] = [None] if skip is None else list(range(len(skip)))
        padding = [0] if skip is None else skip
        caches = [method.new_state(rope) for _ in rows]
        batch, tokens = 1, 0
        layers: list[CacheLayerMixin] = []
        served = [index for index, recorded in enumerate(recording.recorded) if recorded.served]
        for index, recorded in enumerate(recording.recorded):
            if not recorded.served:
                layers.append(_dense(recorded))
                continue
            depth = depth_of(served.index(index), len(served))
            for cache, row, pad in zip(caches, rows, padding, strict=True):
                kv = recorded.layer_kv(row, pad)
                cache.ingest(index, kv._replace(depth=depth, shared=shared))
                batch, tokens = kv.k.shape[0], recorded.tokens
                del kv  # or a layer would be held while the next one is computed
            layers.append(MethodLayer(index, self._shares, recorded.tokens))
        self._shares += [Share(cache, batch) for cache in caches]
        self.row_tokens = [tokens - pad for pad in padding for _ in range(batch)]
        for cache, row in zip(caches, rows, strict=True):
            cache.complete()
            if self._foresight is not None:
                cache.foresee(partial(_guess, self._foresight, slice(None) if row is None else slice(row, row + 1)))
        self.layers = layers

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        _refuse("beam search")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        _refuse("several answers per prompt in one batch")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        _refuse("contrastive search")

    def crop(self, *args: int, **kwargs: int) -> NoReturn:
        _refuse("taking tokens back, as assisted generation does")

    def nbytes(self) -> Bytes:
        """What the method holds, and the layers it does not serve."""
        total = sum((share.cache.nbytes() for share in self._shares), Bytes(0, 0))
        others = [layer for layer in self.layers if isinstance(layer, DynamicLayer)]
        dense = sum(x.nbytes for layer in others for x in (layer.keys, layer.values))
        return total + Bytes(dense, 0)

    def resident_chunks(self) -> list[Tensor]:
        """See `DecodeCache.resident_chunks`."""
        return [numbers for share in self._shares for numbers in share.cache.resident_chunks()]

    def chunk_numbers(self) -> list[Tensor]:
        """See `DecodeCache.chunk_numbers`."""
        return [numbers for share in self._shares for numbers in share.cache.chunk_numbers()]

    def close(self) -> None:
        """Let go of everything held; the cache cannot be used afterwards."""
        for share in self._shares:
            share.cache.close()
        if self._foresight is not None:
            self._foresight.close()
        self._shares, self.layers = [], []

    @property
    def positions(self) -> Tensor | None:
        """Where each row's next token goes, [B,1], if rows differ in that; transformers counts for equal ones."""
        return None if len(set(self.row_tokens)) == 1 else torch.tensor(self.row_tokens)[:, None]

    def fed(self, tokens: int) -> None:
        """Tell that every row was given this many tokens more."""
        self.row_tokens = [held + tokens for held in self.row_tokens]

    def reserve(self, tokens: int) -> None:
        """See `DecodeCache.reserve`."""
        for share in self._shares:
            share.cache.reserve(tokens)

    @property
    def steady(self) -> bool:
        """Whether one token per row is a fixed sequence of operations in every layer: `make_room` to `with_room`."""
        ours = all(isinstance(layer, MethodLayer) for layer in self.layers)
        return ours and all(share.cache.steady for share in self._shares)

    def make_room(self) -> bool:
        """See `DecodeCache.make_room`."""
        moved = [share.cache.make_room() for share in self._shares]
        return any(moved)

    @property
    def rearranges(self) -> bool:
        return any(share.cache.rearranges for share in self._shares)

    def rearrange(self) -> None:
        for share in self._shares:
            share.cache.rearrange()

    def recount(self) -> None:
        """Make transformers count from what `fed` was told: a replayed graph tells it nothing."""
        for layer in self.layers:
            if isinstance(layer, MethodLayer):
                layer.columns = max(self.row_tokens)

    @contextmanager
    def with_room(self) -> Iterator[None]:
        """Within the block a forward pass of one token per row is only that, after `make_room`."""
        layers = [layer for layer in self.layers if isinstance(layer, MethodLayer)]
        try:
            for layer in layers:
                layer.has_room = True
            yield
        finally:
            for layer in layers:
                layer.has_room = False


class JoinedCache(MethodCache):
    """Prompts that were built one by one, decoded as one batch; the caches of the rows are used up.

    Rows may hold different numbers of tokens, and be batches themselves. `stacked` says whether they became one
    cache, or run one after the other within each layer.
    """

    def __init__(self, model: PreTrainedModel, method: Method, rows: Sequence[MethodCache]) -> None:
        Cache.__init__(self, layers=[])
        self.usable = lambda: True
        self.row_tokens = [tokens for row in rows for tokens in row.row_tokens]
        columns = max(self.row_tokens)
        layers = [list(same) for same in zip(*(row.layers for row in rows), strict=True)]
        if any(isinstance(same[0], DynamicLayer) for same in layers) and len(set(self.row_tokens)) > 1:
            raise SkvError("rows of different lengths cannot be one batch in a model whose layers partly stay dense")
        held = [share for row in rows for share in row._shares]
        for row in rows:
            row._shares = []
            row.close()
        self._adopt(model, method, _joined(held))
        self.layers = [
            _joined_dense(same) if isinstance(same[0], DynamicLayer) else MethodLayer(index, self._shares, columns)
            for index, same in enumerate(layers)
        ]

    def _adopt(self, model: PreTrainedModel, method: Method, shares: list[Share]) -> None:
        self._shares = shares
        self.stacked = len(shares) == 1
        self._foresight = Foresight(model, self) if method.speculates else None
        first = 0
        for share in shares:
            if self._foresight is not None:
                share.cache.foresee(partial(_guess, self._foresight, slice(first, first + share.rows)))
            first += share.rows

    def keep(self, model: PreTrainedModel, method: Method, rows: Sequence[int]) -> JoinedCache:
        """A batch of these rows alone, numbers ascending; this one is used up.

        Raises `SkvError` for models with layers that no method serves.
        """
        if any(isinstance(layer, DynamicLayer) for layer in self.layers):
            raise SkvError("rows cannot be taken out of a batch in a model whose layers partly stay dense")
        kept = JoinedCache.__new__(JoinedCache)
        Cache.__init__(kept, layers=[])
        kept.usable = lambda: True
        shares, first = list[Share](), 0
        for share in self._shares:
            own = [row - first for row in rows if first <= row < first + share.rows]
            first += share.rows
            if len(own) == share.rows:
                shares.append(share)
            elif own:
                shares.append(Share(share.cache.pick(own), len(own)))
        kept.row_tokens = [self.row_tokens[row] for row in rows]
        kept._adopt(model, method, shares)
        kept.layers = [MethodLayer(index, kept._shares, max(kept.row_tokens)) for index in range(len(self.layers))]
        self._shares, self.layers = [], []
        return kept


def _joined(held: list[Share]) -> list[Share]:
    """As few caches as can hold the rows of all."""
    joined = type(held[0].cache).join([share.cache for share in held])
    if len(joined) == len(held):
        return [Share(cache, share.rows) for cache, share in zip(joined, held, strict=True)]
    assert len(joined) == 1
    return [Share(joined[0], sum(share.rows for share in held))]


def _refuse(what: str) -> NoReturn:
    raise SkvError(f"{what} cannot be done with this cache: use greedy decoding or sampling, one answer per row")


def _guess(foresight: Foresight, rows: slice, layer: int) -> Tensor:
    return foresight.query(layer, seen_by=layer - 1)[rows]


def _dense(recorded: RecordedLayer) -> DynamicLayer:
    kv = recorded.layer_kv(None, 0)
    if recorded.window is None:
        whole = DynamicLayer()
        whole.update(kv.k, kv.v)
        return whole
    layer = DynamicSlidingWindowLayer(sliding_window=recorded.window)
    kept = min(recorded.window - 1, recorded.tokens)
    layer.update(kv.k[:, :, recorded.tokens - kept :], kv.v[:, :, recorded.tokens - kept :])
    layer.cumulative_length = recorded.tokens
    return layer


def _joined_dense(rows: list[Any]) -> DynamicLayer:
    first = rows[0]
    windowed = isinstance(first, DynamicSlidingWindowLayer)
    joined = DynamicSlidingWindowLayer(sliding_window=first.sliding_window) if windowed else DynamicLayer()
    joined.update(torch.cat([row.keys for row in rows]), torch.cat([row.values for row in rows]))
    if windowed:
        joined.cumulative_length = first.cumulative_length
    return joined
