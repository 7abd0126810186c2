"""Full attention of one query per head by torch's FlexAttention.

Compiled it decodes by splitting the context, if a KV head's query heads are a power of two; else torch takes its kernel
for prompts, which does not split.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask


def whole_context(q: Tensor, k: Tensor, v: Tensor, scaling: float, compiled: bool) -> Callable[[], Tensor]:
    """A call that attends to every token. q [B,Hq,1,D]; k and v [B,H,N,D]; returns [B,Hq,1,D].

    The first call compiles, and raises the compiler's RuntimeError where it cannot. Uncompiled, the scores of all
    tokens lie in memory.
    """
    # Nothing is masked. But without a mask torch takes the context for one block of 2**30 tokens and splits that, so
    # that the first split gets all there is (torch 2.13, flex_decode.py.jinja).
    mask = create_block_mask(noop_mask, None, None, 1, k.shape[2], device=q.device)
    attend = _compiled() if compiled else _eager
    return partial(attend, q, k, v, block_mask=mask, scale=scaling, enable_gqa=True)


def _compiled() -> Callable[..., Any]:
    """Whole or not at all: what torch fails to compile must not be run uncompiled in its place.

    Tuned, because untuned torch 2.13 gives its kernel a single stage, in which it waits for all that it loads; without
    the table that tuning prints.
    """
    return torch.compile(
        flex_attention,
        fullgraph=True,
        dynamic=False,
        options={"max_autotune": True, "autotune_num_choices_displayed": 0},
    )


def _eager(*args: Any, **named: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(*args, **named)
