"""Rotate and un-rotate keys with the model's own rotary functions, for any family and any layer kind.

cos and sin come from the model's `rotary_emb` (Gemma-3 has one per kind of layer) and the rotation is the
modeling module's `apply_rotary_pos_emb` (GLM rotates interleaved pairs of half the width). Rotating with -sin
undoes it; YaRN and longrope scale cos and sin by a factor a, so the rotated part is divided by
a^2 = cos^2 + sin^2.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from shadowkv.errors import SkvError
from shadowkv.ranges import ranged


class Rope:
    """The rotary embedding of one model.

    `table_tokens` is the number of positions for which cos and sin are kept; it grows on demand. Where the
    frequencies depend on the length of the sequence (longrope), tables are made for one regime at a time and
    `crossing` tells where the regimes meet.
    """

    def __init__(self, model: Any) -> None:
        decoder = model.get_decoder()
        module = sys.modules[type(decoder).__module__]
        self._embed: nn.Module | None = getattr(decoder, "rotary_emb", None)
        self._apply = getattr(module, "apply_rotary_pos_emb", None)
        if self._embed is None or self._apply is None:
            raise SkvError(f"{type(model).__name__} is not a RoPE decoder that skv can drive: no rotary embedding")
        config = model.config.get_text_config()
        per_kind = "layer_type" in inspect.signature(self._embed.forward).parameters
        self._kinds: list[str] | None = list(config.layer_types) if per_kind else None
        self._tables: dict[tuple[str | None, torch.device, bool], tuple[Tensor, Tensor]] = {}
        self.derived: dict[Hashable, Any] = {}  # what others make of these tables, once for all layers of a kind
        parameters = getattr(config, "rope_parameters", None) or {}
        self._drifts = parameters.get("rope_type") == "dynamic"
        self.crossing: int | None = _crossing(config, parameters)

    def check_span(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise if generating would change the frequencies under the keys already in the cache."""
        end = prompt_tokens + new_tokens
        if self.crossing is None or end <= self.crossing:
            return
        if self._drifts:
            raise SkvError(
                f"this model's rotary frequencies drift with every token beyond {self.crossing} (dynamic NTK), "
                f"which no KV cache can follow: keep prompt and answer ({end} tokens) below that"
            )
        if prompt_tokens <= self.crossing:
            raise SkvError(
                f"this model's rotary frequencies change beyond {self.crossing} tokens, and a prompt of "
                f"{prompt_tokens} + {new_tokens} new tokens crosses that point: use a shorter or a longer prompt"
            )

    @ranged("rebuild")
    def rotate(self, layer: int, k: Tensor, positions: Tensor, length: int) -> Tensor:
        """RoPE for keys of `layer`. k [B,H,T,D] pre-RoPE, positions [B,H,T] or broadcastable -> [B,H,T,D].

        `length` is the number of tokens of the sequence, which picks the frequency regime of longrope models.
        """
        cos, sin = self._cos_sin(layer, positions, length, k)
        return self._turn(k, cos, sin)

    def unrotate(self, layer: int, k: Tensor, positions: Tensor, length: int) -> Tensor:
        """The inverse of `rotate`, computed and returned in fp32."""
        k = k.float()
        cos, sin = self._cos_sin(layer, positions, length, k)
        turned = self._turn(k, cos, -sin)
        width = cos.shape[-1]
        square = (cos[..., :1].square() + sin[..., :1].square()).expand(*turned.shape[:-1], 1)
        return torch.cat((turned[..., :width] / square, turned[..., width:]), dim=-1)

    def regime(self, layer: int, length: int) -> tuple[str | None, bool]:
        """What the frequencies of a layer depend on: its kind, and whether the sequence is beyond `crossing`."""
        kind = self._kinds[layer] if self._kinds else None
        return kind, self.crossing is not None and length > self.crossing

    def _turn(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The modeling functions take one position per (batch, token), so heads are folded into the batch; the
        # second argument has no heads, since only one tensor is to be rotated.
        batch, heads, tokens, head_dim = k.shape
        flat = k.reshape(batch * heads, 1, tokens, head_dim)
        cos, sin = (x.expand(batch, heads, tokens, -1).flatten(0, 1) for x in (cos, sin))
        assert self._apply is not None
        turned, _ = self._apply(flat, flat[:, :0], cos, sin)
        result: Tensor = turned.reshape(batch, heads, tokens, head_dim)
        return result.to(k.dtype)

    def _cos_sin(self, layer: int, positions: Tensor, length: int, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._table(layer, length, k.device)
        dtype = torch.float32 if k.dtype == torch.float64 else k.dtype
        while positions.dim() < 3:
            positions = positions.unsqueeze(0)
        return cos[positions].to(dtype), sin[positions].to(dtype)

    def _table(self, layer: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        kind, beyond = self.regime(layer, length)
        key = (kind, device, beyond)
        if key not in self._tables or self._tables[key][0].shape[0] < length:
            tokens = -(-length // 1024) * 1024
            if self.crossing is not None:
                # Asking the model for one position past the crossing would switch its frequencies.
                tokens = max(tokens, self.crossing + 1) if beyond else min(tokens, self.crossing)
            positions = torch.arange(tokens, device=device)[None]
            extra = {} if kind is None else {"layer_type": kind}
            assert self._embed is not None
            with torch.no_grad():
                cos, sin = self._embed(torch.zeros(1, device=device), positions, **extra)
            self._tables[key] = (cos[0].float(), sin[0].float())
        return self._tables[key]


def _crossing(config: Any, parameters: dict[str, Any]) -> int | None:
    """The sequence length beyond which a model's rotary frequencies are different ones, if there is one."""
    if parameters.get("rope_type") == "dynamic":
        return int(config.max_position_embeddings)
    if parameters.get("rope_type") == "longrope":
        return int(parameters["original_max_position_embeddings"])
    return None
