"""The attention function that transformers calls, and how it finds the cache layer it is to ask.

`Cache.update()` returns the keys with a handle to their cache layer attached, and the attention function, which
transformers does not give the cache, finds it there. Each kind of layer knows what attention means in its phase.
Nothing is global and no model code is touched; caches of other kinds get transformers' own dense attention.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from shadowkv.errors import SkvError

NAME = "skv"
_HANDLE = "_skv_layer"


class AttendingLayer(Protocol):
    """A cache layer that answers attention itself."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """q [B,Hq,T,D]; k and v as `update()` returned them; mask [B,1,T,n] bool or None. Returns [B,Hq,T,D]."""


def attach(model: PreTrainedModel) -> None:
    """Route the model's attention through this module; harmless for caches of other kinds."""
    AttentionInterface.register(NAME, attention)
    # Without a mask function of the same name no mask is made at all, and sliding layers and padding go wrong.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


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
    if layer is None:
        dense = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return cast("tuple[Tensor, None]", dense)
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise SkvError("models with attention sinks or logit soft-capping are not supported")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    out = layer.attention(query, key, value, attention_mask, scale)
    return out.transpose(1, 2), None


def with_handle(key: Tensor, layer: AttendingLayer) -> Tensor:
    # A fresh tensor object: a view's attributes must not leak onto what the model goes on to use.
    key = key.view_as(key)
    setattr(key, _HANDLE, layer)
    return key


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Causal attention of a prefill chunk. q [B,Hq,T,D], k, v [B,H,n,D], mask [B,1,T,n] bool or None."""
    if mask is None:
        # No mask means the queries are the whole sequence, or a single token that sees everything.
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scaling, enable_gqa=True)
    groups = q.shape[1] // k.shape[1]
    grouped = q.reshape(q.shape[0], k.shape[1], groups * q.shape[2], q.shape[3])
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask.repeat(1, 1, groups, 1), scale=scaling)
    return out.view_as(q)
