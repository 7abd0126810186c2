"""What full attention of one query per head stands beside: every other way to it that one machine or another has.

`full` decodes by the kernel of this project, so these are what a gain over `full` has to be believed against.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evals.bench.kernels import flashinfer_decode, flex_attention
from evals.bench.kernels.items import Call, NotHereError, Way
from shadowkv.common.wording import one_line, plain_line


class Whole(NamedTuple):
    """One query per head and a whole context. q [B,Hq,1,D]; k and v [B,H,N,D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float


def ways(asked: Whole, device: str) -> tuple[Way, ...]:
    """Each made, and found to be missing, when its turn comes. `device` is where times would be taken."""
    # On a CPU compiling takes a minute and a C++ compiler, for what is not timed.
    compiled = device != "cpu"
    by_flex = partial(flex_attention.whole_context, *asked, compiled)
    return (
        Way("torch sdpa", lambda: [_by_heads(asked)], True),
        Way("sdpa flash", lambda: [by_groups(asked, SDPBackend.FLASH_ATTENTION)], True),
        Way("sdpa cudnn", lambda: [by_groups(asked, SDPBackend.CUDNN_ATTENTION)], True),
        Way("torch flex" if compiled else "torch flex, eager", lambda: [by_flex()], True),
        Way("flashinfer, untried", lambda: [flashinfer_decode.whole_context(*asked)], True),
    )


def _by_heads(asked: Whole) -> Call:
    """As torch chooses, the query heads of a group as heads that share their keys."""
    q, k, v, scaling = asked
    return partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, scale=scaling, enable_gqa=True)


def by_groups(asked: Whole, backend: SDPBackend) -> Callable[[], Tensor]:
    """By one of torch's kernels, the query heads of a group as that many queries: keys are then read once for all.

    Nothing is masked, so flash attention may divide the context. Returns [B,Hq,1,D]. Raises `NotHereError` with what
    torch says where it has no such kernel for this.
    """
    q, k, v, scaling = asked
    if backend == SDPBackend.CUDNN_ATTENTION and q.device.type == "cpu":
        raise NotHereError("cuDNN needs a GPU")
    groups = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            answer = torch.nn.functional.scaled_dot_product_attention(groups, k, v, scale=scaling)
        return answer.reshape(q.shape)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            attend()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failure:
            # torch warns of each condition that is not met, and where in its own code.
            reasons = [plain_line(str(each.message).partition(" (Triggered internally")[0]) for each in said]
            raise NotHereError("; ".join([one_line(failure), *reasons])) from failure
    return attend
