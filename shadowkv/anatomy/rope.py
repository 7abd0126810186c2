"""Rotate and un-rotate keys as the model itself does, layer by layer, for any family.

cos and sin come from the model's `rotary_emb` (Gemma-3 has one per kind of layer) and the rotation is the modeling
module's own function. Which of a layer's channels it turns, if any, is learned from keys of one token at several
positions (`survey.py`): the first ones in Phi-2, none in every fourth layer of SmolLM3. Rotating with -sin undoes it;
YaRN and longrope scale cos and sin by a factor a, so the rotated part is divided by a^2 = cos^2 + sin^2.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shadowkv.anatomy.rotary_form import Form, fitting, neighbours, turn_of
from shadowkv.anatomy.survey import Survey, survey
from shadowkv.common.errors import SkvError
from shadowkv.common.ranges import ranged

# By how much predicted keys may differ from the model's own, in relation to their size.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


class Rope:
    """The rotary embedding of one model.

    Where the frequencies depend on the length of the sequence (longrope, dynamic NTK), tables are made for one regime
    at a time and `crossings` are the lengths at which regimes meet.
    """

    def __init__(self, model: Any, found: Survey | None = None) -> None:
        """found: what a survey of the model saw, made here if not given."""
        found = found or survey(model)
        decoder = model.get_decoder()
        config = model.config.get_text_config()
        self._embed = rotary_module(model)
        declared: list[str | None] = getattr(config, "layer_types", None) or []
        asked = () if self._embed is None else inspect.signature(self._embed.forward).parameters
        per_kind = bool(declared) and "layer_type" in asked
        self._kinds: list[str | None] = declared if per_kind else [None] * len(found.layers)
        self._tables: dict[tuple[str | None, torch.device, bool], tuple[Tensor, Tensor]] = {}
        self.derived: dict[Hashable, Any] = {}  # what others make of these tables, once for all layers of a kind
        self._parameters = _by_kind(config, set(self._kinds))
        self._crossing_of = {kind: _crossing(config, given) for kind, given in self._parameters.items()}
        self._turn = turn_of(sys.modules[type(decoder).__module__])
        probed = enumerate(found.probe_keys)
        self._forms = [None if keys.is_meta else self._form(layer, keys) for layer, keys in probed]

    def knows(self, layers: Iterable[int]) -> bool:
        """Whether it is known how each of these layers turns its keys."""
        return all(self._forms[layer] is not None for layer in layers)

    @property
    def tables(self) -> list[object]:
        """Everything made so far, and what others made of it: a longer sequence may replace what is in use."""
        return [*self._tables.values(), *self.derived.values()]

    @property
    def crossings(self) -> list[int]:
        """Lengths beyond which frequencies are others, ascending."""
        return sorted({crossing for crossing in self._crossing_of.values() if crossing is not None})

    def check_span(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise if generating would change the frequencies under the keys already in the cache."""
        end = prompt_tokens + new_tokens
        for kind, crossing in self._crossing_of.items():
            if crossing is None or end <= crossing:
                continue
            if self._parameters[kind].get("rope_type") == "dynamic":
                raise SkvError(
                    f"this model's rotary frequencies drift with every token beyond {crossing} (dynamic NTK), "
                    f"which no KV cache can follow: keep prompt and answer ({end} tokens) below that"
                )
            if prompt_tokens <= crossing:
                raise SkvError(
                    f"this model's rotary frequencies change beyond {crossing} tokens, and a prompt of "
                    f"{prompt_tokens} + {new_tokens} new tokens crosses that point: use a shorter or a longer prompt"
                )

    @ranged("rebuild")
    def rotate(self, layer: int, k: Tensor, positions: Tensor, length: int) -> Tensor:
        """RoPE for keys of `layer`. k [B,H,T,D] pre-RoPE, positions [B,H,T] or broadcastable -> [B,H,T,D].

        `length` is the number of tokens of the sequence, which picks the frequency regime of longrope models.
        Raises `SkvError` where it is not known how the layer turns its keys.
        """
        form = self._known(layer)
        return form.turned(k, *self._cos_sin(layer, positions, length, k)) if form.channels else k

    def unrotate(self, layer: int, k: Tensor, positions: Tensor, length: int) -> Tensor:
        """The inverse of `rotate`, computed and returned in fp32."""
        k, form = k.float(), self._known(layer)
        if not form.channels:
            return k
        cos, sin = self._cos_sin(layer, positions, length, k)
        turned = form.turned(k, cos, -sin)
        width = min(cos.shape[-1], form.channels)
        square = (cos[..., :1].square() + sin[..., :1].square()).expand(*turned.shape[:-1], 1)
        return torch.cat((turned[..., :width] / square, turned[..., width:]), dim=-1)

    def regime(self, layer: int, length: int) -> Hashable:
        """What a layer's rotation depends on: its kind, whether the sequence is beyond a crossing, its form."""
        return (*self._frequencies(layer, length), self._known(layer))

    def scale(self, layer: int, like: Tensor) -> Tensor:
        """What each channel is multiplied by after the rotation, in relation to its partner. [D], 1 for most models."""
        scale = self._known(layer).scale
        return torch.ones_like(like) if scale is None else scale.to(like)

    def crossing(self, layer: int) -> int | None:
        """The sequence length beyond which a layer's frequencies are other ones, if there is one."""
        return self._crossing_of[self._kinds[layer]]

    def _frequencies(self, layer: int, length: int) -> tuple[str | None, bool]:
        crossing = self.crossing(layer)
        return self._kinds[layer], crossing is not None and length > crossing

    def _known(self, layer: int) -> Form:
        form = self._forms[layer]
        if form is None:
            raise SkvError(f"layer {layer} of this model turns its keys in a way that skv does not understand")
        return form

    def _form(self, layer: int, keys: Tensor) -> Form | None:
        """How a layer turns its keys, from those of one token per row at several positions; None if it is not known."""
        tolerance, keys = _TOLERANCE.get(keys.dtype, 1e-3), keys.float()
        if self._embed is None:
            cos, sin = keys.new_ones(keys.shape[2], 0), keys.new_zeros(keys.shape[2], 0)
            return fitting(keys, cos, sin, None, tolerance)
        cos, sin = (part[: keys.shape[2]] for part in self._table(layer, keys.shape[2], keys.device))
        if self._turn is not None and not bool(keys.isfinite().all()):
            return Form(keys.shape[-1], self._turn)  # what overflows is told elsewhere
        return fitting(keys, cos, sin, self._turn, tolerance)

    def _cos_sin(self, layer: int, positions: Tensor, length: int, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._table(layer, length, k.device)
        dtype = torch.float32 if k.dtype == torch.float64 else k.dtype
        while positions.dim() < 3:
            positions = positions.unsqueeze(0)
        return cos[positions].to(dtype), sin[positions].to(dtype)

    def _table(self, layer: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        kind, beyond = self._frequencies(layer, length)
        key = (kind, device, beyond)
        if key not in self._tables or self._tables[key][0].shape[0] < length:
            tokens = -(-length // 1024) * 1024
            crossing = self.crossing(layer)
            if crossing is not None:
                # Asking the model for one position past the crossing would switch its frequencies.
                tokens = max(tokens, crossing + 1) if beyond else min(tokens, crossing)
            positions = torch.arange(tokens, device=device)[None]
            extra = {} if kind is None else {"layer_type": kind}
            assert self._embed is not None
            with torch.no_grad():
                rotary = self._embed(torch.zeros(1, device=device), positions, **extra)
            if isinstance(rotary, Tensor) and rotary.is_complex():
                self._turn, rotary = neighbours, (rotary.real, rotary.imag)
            cos, sin = rotary
            self._tables[key] = (cos[0].float(), sin[0].float())
        return self._tables[key]


def rotary_module(model: Any) -> nn.Module | None:
    """What makes cos and sin of positions in this model, if anything does."""
    named = ((name.rpartition(".")[2], module) for name, module in model.get_decoder().named_modules())
    return next((module for name, module in named if name == "rotary_emb"), None)


def _by_kind(config: Any, kinds: set[str | None]) -> Mapping[str | None, dict[str, Any]]:
    """The rotary parameters of each kind of layer: transformers 5 may give them by kind."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = any(isinstance(value, dict) for value in given.values())
    return {kind: dict(given.get(kind) or {}) if nested and kind is not None else dict(given) for kind in kinds}


def _crossing(config: Any, parameters: dict[str, Any]) -> int | None:
    """The sequence length beyond which a model's rotary frequencies are different ones, if there is one."""
    if parameters.get("rope_type") == "dynamic":
        return int(config.max_position_embeddings)
    if parameters.get("rope_type") == "longrope":
        return int(parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return None
