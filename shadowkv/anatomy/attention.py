"""The attention function that transformers calls, and how it finds the cache layer it is to ask.

`Cache.update()` returns the keys with a handle to their cache layer attached, and the attention function, which
transformers does not give the cache, finds it there. Each kind of layer knows what attention means in its phase.
Nothing is global and no model code is touched; caches of other kinds get transformers' own dense attention.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from shadowkv.common.errors import SkvError

NAME = "skv"
_HANDLE = "_skv_layer"


class AttendingLayer(Protocol):
    """A cache layer that answers attention itself."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """q [B,Hq,T,D]; k and v as `update()` returned them; mask: see `mask_of_chunk`. Returns [B,Hq,T,D]."""


def attach(model: PreTrainedModel) -> None:
    """Route the model's attention through this module; harmless for caches of other kinds."""
    AttentionInterface.register(NAME, attention)
    # Without a mask function of the same name no mask is made at all, and sliding layers and padding go wrong.
    AttentionMaskInterface.register(NAME, mask_of_chunk)
    model.set_attn_implementation(NAME)


def mask_of_chunk(
    *,
    kv_length: int,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: [B,1,T,n] bool or, where every query sees all before it, None.

    None also for the chunk of a prompt, whose queries are the last T of n tokens: see `dense_attention`. A mask would
    take T * n bytes for as long as the chunk is under way.
    """
    if allow_is_causal_skip and "q_offset" in kwargs:
        # Not where a static cache has room behind the newest token. transformers 5.2 tells so itself.
        allow_is_causal_skip = bool(kwargs["q_offset"] + kwargs["q_length"] == kv_offset + kv_length)
    causal = allow_is_causal_skip and local_size is None
    if causal and attention_mask is not None:
        causal = attention_mask.shape[-1] >= kv_offset + kv_length and bool(attention_mask.all())
    if causal:
        return None
    return cast(
        "Tensor | None",
        sdpa_mask(
            kv_length=kv_length,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        ),
    )


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
    layer: AttendingLayer | None = getattr(key, _HANDLE, None)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if layer is None and attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        # transformers takes no mask to mean that queries and keys begin at the same token.
        return dense_attention(query, key, value, None, scale).transpose(1, 2).contiguous(), None
    if layer is None:
        dense = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return cast("tuple[Tensor, None]", dense)
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise SkvError("models with attention sinks or logit soft-capping are not supported")
    # Contiguous as transformers' own functions make it: some models take views of it.
    return layer.attention(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


def with_handle(key: Tensor, layer: AttendingLayer) -> Tensor:
    # A fresh tensor object: a view's attributes must not leak onto what the model goes on to use.
    key = key.view_as(key)
    setattr(key, _HANDLE, layer)
    return key


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of a prefill chunk. q [B,Hq,T,D], k, v [B,H,n,D], mask [B,1,T,n] bool.

    Without a mask it is causal, the queries being the last T of the n tokens.
    """
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and queries in (1, keys):
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, scale=scaling, enable_gqa=True)
    if mask is None and _has_flash(q, k, v):
        # A kernel that knows where the queries begin: with a mask there is none that runs in blocks.
        aligned = causal_lower_right(queries, keys)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=aligned, scale=scaling, enable_gqa=True)
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)[None, None]
    groups = q.shape[1] // k.shape[1]
    grouped = q.reshape(q.shape[0], k.shape[1], groups * queries, q.shape[3])
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask.repeat(1, 1, groups, 1), scale=scaling)
    return out.view_as(q)


def _has_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.device.type == "cuda" and bool(can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True)))
