"""Full attention of one query per head by FlashInfer, where it is installed: batch decode over a paged cache.

Written by its documentation and source (0.7.2), and never run: no machine of ours has both it and a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from evals.bench.kernels.items import NotHereError
from shadowkv.common.errors import SkvError
from shadowkv.common.wording import one_line

_PAGE_TOKENS = 16
_WORKSPACE_BYTES = 2**28  # twice what it recommends
_TENSOR_CORE_GROUP = 4  # query heads of a KV head from which serving engines have it use tensor cores


def missing(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashInfer cannot be asked for this, or None if it is here and has kernels for it."""
    if device == "cpu":
        return "FlashInfer needs a GPU"
    if dtype not in (torch.float16, torch.bfloat16) or head_dim not in (64, 128, 256):
        return "FlashInfer has kernels for 16 bits and heads of 64, 128 or 256"
    return None if importlib.util.find_spec("flashinfer") else "FlashInfer is not installed"


def whole_context(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Callable[[], Tensor]:
    """A call that attends to every token. q [B,Hq,1,D]; k and v [B,H,N,D], copied into pages; returns [B,Hq,1,D].

    FlashInfer compiles its kernels here. Raises `NotHereError` where it has none, and `SkvError` with what it says if
    it fails.
    """
    reason = missing(q.device.type, q.dtype, q.shape[-1])
    if reason is not None:
        raise NotHereError(reason)
    try:
        call = _planned(q, k, v, scaling)
        call()
    except Exception as failure:  # of every kind: imports, compilers, checks of its own
        raise SkvError(f"flashinfer: {type(failure).__name__}: {one_line(failure)}") from failure
    return call


def _planned(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Callable[[], Tensor]:
    batch, heads, tokens, head_dim = k.shape
    page = math.gcd(tokens, _PAGE_TOKENS)  # so that all are full
    pages = [x.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1).contiguous() for x in (k, v)]
    numbers = torch.arange(len(pages[0]), dtype=torch.int32, device=q.device)
    starts = torch.arange(0, len(numbers) + 1, tokens // page, dtype=torch.int32, device=q.device)
    newest = torch.full((batch,), page, dtype=torch.int32, device=q.device)
    decode = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=q.shape[1] // heads >= _TENSOR_CORE_GROUP,
        paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=numbers.clone(),
        paged_kv_last_page_len_buffer=newest.clone(),
    )
    types = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    decode.plan(starts, numbers, newest, q.shape[1], heads, head_dim, page, sm_scale=scaling, **types)
    return lambda: decode.run(q.squeeze(2), tuple(pages)).unsqueeze(2)
