"""A model's forward pass through a cache: the one place that knows what this version of transformers calls things."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

# transformers renamed the argument in 5.24, and drops the older name in 5.40.
_CACHE_ARGUMENTS = ("cache", "past_key_values")


def last_logits(model: PreTrainedModel, input_ids: Tensor, through: Cache, **more: Any) -> Tensor:
    """Feed [B,T] tokens to `through` and return the logits after the last one, [B,vocab] fp32."""
    given = {cache_argument(type(model).forward): through, "use_cache": True, "logits_to_keep": 1, **more}
    logits: Tensor = model(input_ids, **given).logits
    return logits[:, -1].float()


@cache
def cache_argument(function: Callable[..., Any]) -> str:
    """The name under which a forward function of this version of transformers takes a cache."""
    parameters = inspect.signature(function).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), _CACHE_ARGUMENTS[-1])
