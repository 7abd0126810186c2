"""How a method meets transformers: `Cache` subclasses, and the attention function that looks for them.

`update()` returns the keys with a handle to their cache layer attached, and the attention function, which
transformers does not give the cache, finds it there. Each kind of layer knows what attention means in its phase: a
`RecordingLayer` is dense and keeps everything, a `MethodLayer` asks its method. Nothing is global and no model code
is touched; models loaded without these caches behave as stock ones.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from shadowkv.errors import SkvError
from shadowkv.method import Bytes, DecodeCache, Dims, LayerKV, Method
from shadowkv.rope import Rope

ATTENTION = "skv"
OBSERVED_QUERIES = 64  # last queries kept for methods that look at them; also the least a prefill computes anew
_HANDLE = "_skv_layer"


def attach(model: PreTrainedModel) -> None:
    """Route the model's attention through this module; harmless for caches of other kinds."""
    AttentionInterface.register(ATTENTION, attention)
    # Without a mask function of the same name no mask is made at all, and sliding layers and padding go wrong.
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A transformers attention function: dense where no cache layer of ours is attached to `key`."""
    layer = getattr(key, _HANDLE, None)
    if layer is None:
        dense = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return cast("tuple[Tensor, None]", dense)
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise SkvError("models with attention sinks or logit soft-capping are not supported")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    out: Tensor = layer.attention(query, key, value, attention_mask, scale)
    return out.transpose(1, 2), None


def _with_handle(key: Tensor, layer: CacheLayerMixin) -> Tensor:
    # A fresh tensor object: a view's attributes must not leak onto what the model goes on to use.
    key = key.view_as(key)
    setattr(key, _HANDLE, layer)
    return key


def _count(query: int | Tensor) -> int:
    """transformers 5.2 hands over cache positions where later versions hand over their number."""
    return query if isinstance(query, int) else int(query.shape[0])


class RecordingLayer(CacheLayerMixin):
    """Dense attention during prefill; keeps all keys and values and the last queries."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.sliding_window = window  # read by transformers where is_sliding is set
        self.tokens = 0
        self.scaling = 1.0
        self.padding: list[int] | None = None  # left padding per row, where a mask told
        self._q_tail: Tensor | None = None
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
        return _with_handle(keys[:, :, visible], self), values[:, :, visible]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        self.scaling = scaling
        if mask is not None and self.window is None and self.padding is None:
            # The last query sees everything but padding, so its first visible column tells how much there is.
            self.padding = mask[:, 0, -1].int().argmax(dim=-1).expand(q.shape[0]).tolist()
        recent = q if self._q_tail is None else torch.cat((self._q_tail, q), dim=2)
        self._q_tail = recent[:, :, -OBSERVED_QUERIES:].clone()
        return dense_attention(q, k, v, mask, scaling)

    def layer_kv(self, row: int | None, skip_tokens: int) -> LayerKV:
        """What was recorded, as views; of one row without its `skip_tokens` of left padding, or of all rows."""
        assert self._q_tail is not None
        assert self._keys is not None
        assert self._values is not None
        rows = slice(None) if row is None else slice(row, row + 1)
        keys, values = (x[rows, :, skip_tokens : self.tokens] for x in (self._keys, self._values))
        return LayerKV(keys, values, self._q_tail[rows, :, -keys.shape[2] :], self.scaling)

    def rewind(self, tokens: int) -> None:
        """Forget everything after the first `tokens`; the buffers stay and are written over."""
        self.tokens = tokens
        self._q_tail = None

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        hidden = self._hidden_tokens(self.tokens)
        return self.tokens + _count(query_length) - hidden, hidden

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
            grown[:, :, : self.tokens] = held[:, :, : self.tokens]
        return grown


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
        return _with_handle(key_states, self), value_states

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        rows = q.shape[0] // len(self._caches)
        split = zip(self._caches, q.split(rows), k.split(rows), v.split(rows), strict=True)
        parts = [cache.attend(self._layer, row_q, row_k, row_v, scaling) for cache, row_q, row_k, row_v in split]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def get_seq_length(self) -> int:
        return self._columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self._columns + _count(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class Recording(Cache):
    """The dense cache of a prefill in progress."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(layers=[RecordingLayer(window) for window in sliding_windows(model.config)])

    @property
    def recorded(self) -> list[RecordingLayer]:
        return cast("list[RecordingLayer]", self.layers)

    @property
    def padding(self) -> list[int] | None:
        """Left padding per row, or None if no row has any."""
        told = next((layer.padding for layer in self.recorded if layer.padding), None)
        return told if told and any(told) else None


class MethodCache(Cache):
    """A prompt as one method keeps it, ready for new tokens; sliding-window layers stay dense in their window."""

    def __init__(self, recording: Recording, method: Method, rope: Rope, skip: list[int] | None = None) -> None:
        super().__init__(layers=[])
        self._caches: list[DecodeCache] = []
        self.begin(recording, method, rope, skip)

    def begin(self, recording: Recording, method: Method, rope: Rope, skip: list[int] | None) -> None:
        """Hand every recorded layer to `method`. `skip` is the left padding per row, None for none."""
        rows: list[int | None] = [None] if skip is None else list(range(len(skip)))
        padding = [0] if skip is None else skip
        self._caches = [method.new_state(rope) for _ in rows]
        layers: list[CacheLayerMixin] = []
        for index, recorded in enumerate(recording.recorded):
            if recorded.window is not None:
                layers.append(_windowed(recorded))
                continue
            for cache, row, pad in zip(self._caches, rows, padding, strict=True):
                cache.ingest(index, recorded.layer_kv(row, pad))
            layers.append(MethodLayer(index, self._caches, recorded.tokens))
        self.layers = layers

    def nbytes(self) -> Bytes:
        """What the method holds, and the windows of the layers it does not serve."""
        total = sum((cache.nbytes() for cache in self._caches), Bytes(0, 0))
        windows = [layer for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        dense = sum(x.numel() * x.element_size() for layer in windows for x in (layer.keys, layer.values))
        return total + Bytes(dense, 0)

    def close(self) -> None:
        """Let go of everything held; the cache cannot be used afterwards."""
        for cache in self._caches:
            cache.close()
        self._caches, self.layers = [], []


class DropInCache(MethodCache):
    """For plain `model.generate`: the first forward pass is recorded as the prompt, the second starts the method."""

    def __init__(self, model: PreTrainedModel, method: Method) -> None:
        method.check(dims_of(model.config, model.dtype.itemsize))
        attach(model)
        Cache.__init__(self, layers=[])
        self._method, self._rope = method, Rope(model)
        self._recording: Recording | None = Recording(model)
        self._caches = []
        self.layers = self._recording.layers

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


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """The window of each layer, None for a layer that sees everything; raises `SkvError` for other layers."""
    config = config.get_text_config()
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise SkvError(f"layers of kind {', '.join(sorted(kinds))} are not supported, only (sliding) attention")
    # Phi-3 declares a window wider than its context: such a layer sees everything.
    return [w if w is not None and w < config.max_position_embeddings else None for w in windows]


def dims_of(config: PreTrainedConfig, element_bytes: int) -> Dims:
    """Geometry of the layers that a method serves."""
    config = config.get_text_config()
    served = tuple(i for i, window in enumerate(sliding_windows(config)) if window is None)
    return Dims(
        layers=len(served),
        q_heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        element_bytes=element_bytes,
        served=served,
    )


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Causal attention of a prefill chunk. q [B,Hq,T,D], k, v [B,H,n,D], mask [B,1,T,n] bool or None."""
    if mask is None:
        # No mask means the queries are the whole sequence, or a single token that sees everything.
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scaling, enable_gqa=True)
    groups = q.shape[1] // k.shape[1]
    grouped = q.reshape(q.shape[0], k.shape[1], groups * q.shape[2], q.shape[3])
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask.repeat(1, 1, groups, 1), scale=scaling)
    return out.view_as(q)


def _windowed(recorded: RecordingLayer) -> DynamicSlidingWindowLayer:
    assert recorded.window is not None
    layer = DynamicSlidingWindowLayer(sliding_window=recorded.window)
    kv = recorded.layer_kv(None, 0)
    kept = min(recorded.window - 1, recorded.tokens)
    layer.update(kv.k[:, :, recorded.tokens - kept :], kv.v[:, :, recorded.tokens - kept :])
    layer.cumulative_length = recorded.tokens
    return layer
