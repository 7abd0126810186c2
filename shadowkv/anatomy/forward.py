"""A model's forward pass through a cache: the one place that knows what this version of transformers calls things."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from shadowkv.common.errors import SkvError

# transformers renamed the argument in 5.24, and drops the older name in 5.40.
_CACHE_ARGUMENTS = ("cache", "past_key_values")


def last_logits(model: PreTrainedModel, input_ids: Tensor, through: Cache, **more: Any) -> Tensor:
    """Feed [B,T] tokens to `through` and return the logits after the last one, [B,vocab] fp32."""
    return logits_after(model, input_ids, through, 1, **more)[:, -1]


def logits_after(model: PreTrainedModel, input_ids: Tensor, through: Cache, wanted: int, **more: Any) -> Tensor:
    """Feed [B,T] tokens to `through` and return the logits after the last `wanted`, [B,wanted,vocab] fp32."""
    given = {cache_argument(type(model).forward): through, "use_cache": True, "logits_to_keep": wanted, **more}
    logits: Tensor = model(input_ids, **given).logits
    return logits[:, -wanted:].float()  # some models take no notice of how many are asked for


def last_hidden(model: PreTrainedModel, input_ids: Tensor, through: Cache) -> Tensor:
    """Feed [B,T] tokens to `through` and return the hidden states that logits are made of, [B,T,hidden]."""
    decoder = model.get_decoder()
    hidden: Tensor = decoder(input_ids, **{cache_argument(type(decoder).forward): through}, use_cache=True)[0]
    return hidden


def check_prompt(input_ids: Tensor) -> None:
    """Refuse what is no prompt, or an empty one."""
    if input_ids.dim() != 2 or not input_ids.numel():
        raise SkvError(f"a prompt must be token ids of shape [batch, tokens], got {list(input_ids.shape)}")


def check_ids(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Refuse token ids that the model has no embedding for: its tokenizer may belong to a larger model.

    On a device nobody waits to look: what is there is what the model itself chose.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if input_ids.device.type == "cpu" and (worst := int(input_ids.max())) >= known:
        raise SkvError(
            f"the prompt holds token id {worst}, and this model's embedding has {known}: is its tokenizer another's?"
        )


@cache
def cache_argument(function: Callable[..., Any]) -> str:
    """The name under which a forward function of this version of transformers takes a cache."""
    parameters = inspect.signature(function).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), _CACHE_ARGUMENTS[-1])
