"""What a model's layers hold and how they attend, found by running it once: no code per family, and no guess.

A decoder can be driven where each layer hands its keys and values to the cache once and then asks transformers'
attention interface with what the cache returned. A few tokens through a cache that takes notes show whether it does;
on the meta device that needs no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from shadowkv.anatomy.attention import attach, dense_attention, with_handle
from shadowkv.anatomy.forward import last_logits
from shadowkv.anatomy.geometry import sliding_windows
from shadowkv.common.dims import Dims, KVLayer
from shadowkv.common.errors import SkvError
from shadowkv.common.wording import one_line

_ROWS, _TOKENS = 4, 8


class CannotRunError(SkvError):
    """The model's own code failed. Without weights, or in a small sample, that tells nothing of the model itself."""


@dataclass(frozen=True)
class Survey:
    """`layers` by number; `probe_keys` [4,H,8,D] of each are those of one token per row, repeated: in a layer they
    differ by their positions alone."""

    layers: tuple[KVLayer, ...]
    probe_keys: tuple[Tensor, ...]

    def dims(self, element_bytes: int, device: str = "cpu") -> Dims:
        """Geometry of the layers that a method serves, on a device of this type."""
        return served_dims(self.layers, element_bytes, device)


def served_dims(layers: Sequence[KVLayer], element_bytes: int, device: str = "cpu") -> Dims:
    """See `Survey.dims`. Without any served layer all counts are 0."""
    served = tuple(number for number, layer in enumerate(layers) if layer.served)
    like = layers[served[0]] if served else layers[0]
    return Dims(
        layers=len(served),
        q_heads=like.q_heads,
        kv_heads=like.kv_heads,
        head_dim=like.head_dim,
        element_bytes=element_bytes,
        served=served,
        device=device,
    )


@torch.inference_mode()
def survey(model: PreTrainedModel) -> Survey:
    """Run `model` on a few tokens. Raises `SkvError` for one that attends in a way that no cache here can follow, and
    `CannotRunError` for one whose own code fails, as some does on the meta device."""
    windows = sliding_windows(model.config)
    name = type(model).__name__
    attach(model)
    census = _Census(windows)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    # A different token in every row, none of them among the first, which are often special.
    tokens = torch.linspace(vocabulary // 3, vocabulary - 2, _ROWS).long()
    try:
        last_logits(model, tokens[:, None].repeat(1, _TOKENS).to(model.device), census)
    except (SkvError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # there is no end to what a model's own code asks of a cache
        raise CannotRunError(f"{name} cannot be driven: it fails with a cache of skv's: {one_line(error)}") from error
    notes = _without_reusing(census.notes)
    layers = tuple(note.described(name, number) for number, note in enumerate(notes))
    served = [layer for layer in layers if layer.served]
    if len({(layer.q_heads, layer.kv_heads, layer.head_dim) for layer in served}) > 1:
        raise SkvError(f"the heads of {name} differ between layers that see everything, which no method here can serve")
    return Survey(layers, tuple(note.keys for note in notes))


class _Notes(CacheLayerMixin):
    """A dense layer that remembers how it was used."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = self.sliding_window = window
        self.is_sliding = window is not None
        self.is_initialized = True
        self.updates = self.asked = 0
        self._q_heads = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.updates += 1
        self.keys, self.values = key_states, value_states
        return with_handle(key_states, self), value_states

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        self.asked += 1
        self._q_heads = q.shape[1]
        if not _same(k, self.keys) or not _same(v, self.values):
            raise SkvError("this model attends to other keys and values than it keeps, which no cache here can follow")
        if mask is not None and (mask.shape[1] > 1 or self.window is None):
            raise SkvError("this model adds a mask of its own to attention, which no cache here can follow")
        return dense_attention(q, k, v, mask, scaling)

    def described(self, model: str, number: int) -> KVLayer:
        """What was found. Raises `SkvError` for a layer that cannot be driven."""
        if self.keys is None or self.values is None:
            raise SkvError(f"layer {number} of {model} keeps no keys and values, as skv's methods need them")
        if self.updates > 1 or not self.asked:
            raise SkvError(
                f"{model} attends by code of its own, not once per layer through transformers' attention interface: "
                "skv cannot drive it"
            )
        if self.keys.shape != self.values.shape:
            widths = f"{self.keys.shape[-1]} and {self.values.shape[-1]}"
            raise SkvError(f"keys and values of {model} differ in width ({widths} channels), which is not supported")
        return KVLayer(self._q_heads, self.keys.shape[1], self.keys.shape[3], self.window, shared=self.asked > 1)

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return _TOKENS, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class _Census(Cache):
    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__(layers=[_Notes(window) for window in windows])

    @property
    def notes(self) -> list[_Notes]:
        return cast("list[_Notes]", self.layers)


def _without_reusing(notes: list[_Notes]) -> list[_Notes]:
    """The last layers may have no keys and values of their own, and attend to those of others instead."""
    own = len(notes) - sum(max(note.asked - 1, 0) for note in notes)
    return notes[:own] if not any(note.updates for note in notes[own:]) else notes


def _same(given: Tensor, kept: Tensor | None) -> bool:
    if kept is None or given.shape != kept.shape:
        return False
    if given.is_meta:
        return bool(given.untyped_storage()._cdata == kept.untyped_storage()._cdata)
    return given.data_ptr() == kept.data_ptr() or torch.equal(given, kept)
