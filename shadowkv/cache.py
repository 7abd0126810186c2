"""How a method meets transformers: `Cache` subclasses that decode through a `DecodeCache`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from shadowkv.attention import attach, with_handle
from shadowkv.errors import SkvError
from shadowkv.foresight import Foresight
from shadowkv.geometry import dims_of
from shadowkv.method import Bytes, DecodeCache, Method, depth_of
from shadowkv.recording import Recorded, RecordedLayer, Recording, count_queries
from shadowkv.rope import Rope


class MethodLayer(CacheLayerMixin):
    """Decoding through a method: one `DecodeCache` for a uniform batch, or one per row of a padded one."""

    is_sliding = False

    def __init__(self, layer: int, caches: list[DecodeCache], columns: int) -> None:
        super().__init__()
        self.is_initialized = True
        self._layer = layer
        self._caches = caches
        self._columns = columns  # tokens of a row, its left padding included: what positions are counted from

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._columns += key_states.shape[2]
        return with_handle(key_states, self), value_states

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        rows = q.shape[0] // len(self._caches)
        split = zip(self._caches, q.split(rows), k.split(rows), v.split(rows), strict=True)
        parts = [cache.attend(self._layer, row_q, row_k, row_v, scaling) for cache, row_q, row_k, row_v in split]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def get_seq_length(self) -> int:
        return self._columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self._columns + count_queries(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class MethodCache(Cache):
    """A prompt as one method keeps it, ready for new tokens; sliding-window layers stay dense in their window."""

    def __init__(self, model: PreTrainedModel, recording: Recorded, method: Method, rope: Rope) -> None:
        super().__init__(layers=[])
        self._caches: list[DecodeCache] = []
        self.usable: Callable[[], bool] = lambda: True  # false once the prompt it shows views of was written over
        self._foresight = Foresight(model, self) if method.speculates else None
        self.begin(recording, method, rope, None)

    def begin(self, recording: Recorded, method: Method, rope: Rope, skip: list[int] | None) -> None:
        """Hand every recorded layer to `method`. `skip` is the left padding per row, None for none."""
        rows: list[int | None] = [None] if skip is None else list(range(len(skip)))
        padding = [0] if skip is None else skip
        self._caches = [method.new_state(rope) for _ in rows]
        layers: list[CacheLayerMixin] = []
        served = [index for index, recorded in enumerate(recording.recorded) if recorded.window is None]
        for index, recorded in enumerate(recording.recorded):
            if recorded.window is not None:
                layers.append(_windowed(recorded))
                continue
            depth = depth_of(served.index(index), len(served))
            for cache, row, pad in zip(self._caches, rows, padding, strict=True):
                cache.ingest(index, recorded.layer_kv(row, pad)._replace(depth=depth))
            layers.append(MethodLayer(index, self._caches, recorded.tokens))
        for cache, row in zip(self._caches, rows, strict=True):
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
        """What the method holds, and the windows of the layers it does not serve."""
        total = sum((cache.nbytes() for cache in self._caches), Bytes(0, 0))
        windows = [layer for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        dense = sum(x.nbytes for layer in windows for x in (layer.keys, layer.values))
        return total + Bytes(dense, 0)

    def close(self) -> None:
        """Let go of everything held; the cache cannot be used afterwards."""
        for cache in self._caches:
            cache.close()
        if self._foresight is not None:
            self._foresight.close()
        self._caches, self.layers = [], []


class JoinedCache(MethodCache):
    """Prompts of one length that were built one by one, decoded as one batch; the rows' own caches are used up.

    `stacked` says whether they became one cache, or run one after the other within each layer.
    """

    def __init__(self, model: PreTrainedModel, method: Method, rows: Sequence[MethodCache]) -> None:
        Cache.__init__(self, layers=[])
        self.usable = lambda: True
        lengths = {row.get_seq_length() for row in rows}
        if len(lengths) != 1:
            raise ValueError(f"rows of one batch hold as many tokens each, not {sorted(lengths)}")
        columns = lengths.pop()
        layers = [list(same) for same in zip(*(row.layers for row in rows), strict=True)]
        held = [cache for row in rows for cache in row._caches]
        for row in rows:
            row._caches = []
            row.close()
        self._caches = list(type(held[0]).join(held))
        self.stacked = len(self._caches) == 1
        self._foresight = Foresight(model, self) if method.speculates else None
        rows_each = len(rows) // len(self._caches)
        for place, cache in enumerate(self._caches):
            if self._foresight is not None:
                of_cache = slice(place * rows_each, (place + 1) * rows_each)
                cache.foresee(partial(_guess, self._foresight, of_cache))
        self.layers = [
            _joined_windows(same) if same[0].is_sliding else MethodLayer(index, self._caches, columns)
            for index, same in enumerate(layers)
        ]


class DropInCache(MethodCache):
    """For plain `model.generate`: the first forward pass is recorded as the prompt, the second starts the method."""

    def __init__(self, model: PreTrainedModel, method: Method) -> None:
        method.check(dims_of(model.config, model.dtype.itemsize, model.device.type))
        attach(model)
        Cache.__init__(self, layers=[])
        self._method, self._rope = method, Rope(model)
        self._recording: Recording | None = Recording(model, method.prefill, method.needs_prompt_queries)
        self._caches = []
        self._foresight = Foresight(model, self) if method.speculates else None
        self.layers = self._recording.layers

    def nbytes(self) -> Bytes:
        """What the method holds or, before it has started, the recorded prompt."""
        if self._recording is None:
            return super().nbytes()
        return Bytes(sum(layer.nbytes() for layer in self._recording.recorded), 0)

    def close(self) -> None:
        self._recording = None
        super().close()

    def __bool__(self) -> bool:
        # Phi-3's generate throws away any true cache before a prompt longer than its short-frequency range; an
        # empty one has nothing that could have been rotated wrongly.
        return bool(self.get_seq_length() > 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._recording is not None and layer_idx == 0 and self._recording.recorded[-1].tokens:
            self.begin(self._recording, self._method, self._rope, self._recording.padding)
            self._recording = None
        return cast("tuple[Tensor, Tensor]", super().update(key_states, value_states, layer_idx, *args, **kwargs))


def _refuse(what: str) -> NoReturn:
    raise SkvError(f"{what} cannot be done with this cache: use greedy decoding or sampling, one answer per row")


def _guess(foresight: Foresight, rows: slice, layer: int) -> Tensor:
    return foresight.query(layer, seen_by=layer - 1)[rows]


def _windowed(recorded: RecordedLayer) -> DynamicSlidingWindowLayer:
    assert recorded.window is not None
    layer = DynamicSlidingWindowLayer(sliding_window=recorded.window)
    kv = recorded.layer_kv(None, 0)
    kept = min(recorded.window - 1, recorded.tokens)
    layer.update(kv.k[:, :, recorded.tokens - kept :], kv.v[:, :, recorded.tokens - kept :])
    layer.cumulative_length = recorded.tokens
    return layer


def _joined_windows(rows: list[Any]) -> DynamicSlidingWindowLayer:
    joined = DynamicSlidingWindowLayer(sliding_window=rows[0].sliding_window)
    joined.update(torch.cat([row.keys for row in rows]), torch.cat([row.values for row in rows]))
    joined.cumulative_length = rows[0].cumulative_length
    return joined
