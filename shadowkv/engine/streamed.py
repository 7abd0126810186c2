"""A prompt computed layer by layer: no more than two layers of its dense keys and values ever exist.

A prefill in chunks finishes all layers of a chunk before the next chunk begins, and so holds a dense prompt at its
end. Here all chunks are under way at once: each is a coroutine that waits at the entrance of a decoder layer until
those before it have gone through. When the last one has, the layer's keys and values are complete: they are handed
out, and let go. What waits is the input of a layer, of all tokens. Each chunk runs the operations of `Engine.prefill`
in their order, so the numbers are the same to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from shadowkv.anatomy.forward import last_logits
from shadowkv.anatomy.geometry import decoder_layers
from shadowkv.common.dims import KVLayer
from shadowkv.common.errors import SkvError
from shadowkv.contract.method import LayerKV
from shadowkv.contract.sparse_prefill import SparsePrefill
from shadowkv.engine.recording import RecordedLayer, Recording, RecordingLayer


class StreamedPrompt:
    """Layers of a prompt [B,S], computed when they are asked for: one after the other, each once.

    Raises `SkvError` for a model in which some layers keep nothing of their own, or run more than once.

    chunk_ends: where the chunks of the prompt end. ahead: how many layers are under way beyond the one asked for, so
    that a GPU goes on while a method builds its cache of that one on another stream.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[KVLayer],
        input_ids: Tensor,
        chunk_ends: Sequence[int],
        *,
        sparse: SparsePrefill | None = None,
        record_queries: bool = False,
        ahead: int = 0,
    ) -> None:
        entrances = decoder_layers(model)
        if len(entrances) != len(layers):
            raise SkvError(f"prompts of {type(model).__name__} cannot be computed layer by layer")
        self._layers = Recording(layers, sparse, record_queries).recorded
        self._tokens, self._ahead = input_ids.shape[1], ahead
        for layer in self._layers:
            layer.reserve(self._tokens)
        self._chunks = [
            _Chunk(model, _ChunkCache(self._layers, start), input_ids[:, start:end])
            for start, end in zip([0, *chunk_ends], chunk_ends, strict=False)
        ]
        self._device = input_ids.device
        self._stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._passed: list[torch.cuda.Event | None] = []  # the layers that all chunks went through, and when
        self._logits: Tensor | None = None
        self._hooks = [layer.register_forward_pre_hook(partial(_wait, self._chunks)) for layer in entrances[1:]]
        # Chunks under way hold each other, and all that they computed, by their frames: nothing else would end them.
        weakref.finalize(self, _end, self._chunks, self._hooks).atexit = False

    @property
    def recorded(self) -> Sequence[RecordedLayer]:
        """Every layer, to be asked in this order."""
        return [
            _StreamedLayer(self, number, layer.window, layer.served, self._tokens)
            for number, layer in enumerate(self._layers)
        ]

    @property
    def logits(self) -> Tensor:
        """Of the last position, [B,vocab] fp32, once the last layer has been asked for."""
        assert self._logits is not None
        return self._logits

    @torch.inference_mode()
    def layer_kv(self, number: int, row: int | None, skip_tokens: int) -> LayerKV:
        """See `RecordedLayer.layer_kv`: usable on the stream that asks for it."""
        wanted = min(number + 1 + self._ahead, len(self._layers))
        try:
            while len(self._passed) < wanted:
                self._pass_layer()
        except BaseException:
            self.close()
            raise
        kv = self._layers[number].layer_kv(row, skip_tokens)
        self._layers[number].let_go()
        passed = self._passed[number]
        if passed is not None:
            asking = torch.cuda.current_stream(self._device)
            asking.wait_event(passed)
            for x in (kv.k, kv.v, kv.q_tail, kv.q_all):
                if x is not None:
                    x.record_stream(asking)  # until it is done there, no other layer is given its memory
        return kv

    def close(self) -> None:
        """Give up what has not been computed."""
        _end(self._chunks, self._hooks)

    def _pass_layer(self) -> None:
        """Take every chunk through one more layer, on the stream on which this prompt was begun."""
        if not self._chunks:
            raise ValueError("this prompt was given up")
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for chunk in self._chunks:
                chunk.parent = getcurrent()
                result = chunk.switch()
            self._passed.append(None if self._stream is None else self._stream.record_event())
        if len(self._passed) == len(self._layers):
            self._logits = result
            self.close()


class _StreamedLayer(NamedTuple):
    """One layer of a streamed prompt."""

    prompt: StreamedPrompt
    number: int
    window: int | None
    served: bool
    tokens: int

    def layer_kv(self, row: int | None, skip_tokens: int) -> LayerKV:
        return self.prompt.layer_kv(self.number, row, skip_tokens)


class _Chunk(greenlet):
    """The forward pass of a chunk; before every layer but the first it goes back to whoever called `switch`."""

    def __init__(self, model: PreTrainedModel, cache: Cache, input_ids: Tensor) -> None:
        super().__init__()
        self._model, self._cache, self._ids = model, cache, input_ids

    def run(self) -> Tensor:
        return last_logits(self._model, self._ids, self._cache)


def _wait(chunks: list[_Chunk], *_: object) -> None:
    """Before a decoder layer: those behind this chunk are first to go through the layer before."""
    current = getcurrent()
    if current in chunks and current.parent is not None:
        current.parent.switch()


def _end(chunks: list[_Chunk], hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()
    for chunk in chunks:
        chunk.parent = getcurrent()
        chunk.throw()
    chunks.clear()


class _ChunkCache(Cache):
    """The cache of a chunk's forward pass, for which the tokens before it are all there are."""

    def __init__(self, recorded: Sequence[RecordingLayer], start: int) -> None:
        super().__init__(layers=[_ChunkLayer(layer, start) for layer in recorded])


class _ChunkLayer(CacheLayerMixin):
    def __init__(self, layer: RecordingLayer, start: int) -> None:
        super().__init__()
        self._layer, self._start = layer, start
        self.is_sliding, self.sliding_window = layer.is_sliding, layer.sliding_window
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._layer.update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self._start

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self._layer.mask_sizes(self._start, query_length)

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1
