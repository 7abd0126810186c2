"""Host memory that a GPU can read by itself: exactly as much as is asked for, and given back when nothing uses it.

torch's own allocator of pinned memory rounds every block up to a power of two and keeps it: values of 24 sequences of
122K tokens, 6 GB per layer, would take 8.
"""

from __future__ import annotations

import mmap
import warnings
import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from shadowkv.common.errors import SkvWarning


class _Pages(mmap.mmap):
    """Memory of its own, which a tensor keeps alive and which knows when it goes."""


def empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in pinned memory or, with a warning, in plain memory where the system refuses that."""
    return _empty(shape, dtype, torch.cuda.cudart(), _launch)


def empty_beside(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of another shape where `like` is: on its device, in pinned memory if it is."""
    if like.device.type == "cpu" and torch.cuda.is_available() and like.is_pinned():
        return empty_pinned(shape, like.dtype)
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def _empty(shape: Sequence[int], dtype: torch.dtype, cudart: Any, launch: Callable[[], object]) -> Tensor:
    count = prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    pages = _Pages(-1, count * dtype.itemsize)
    tensor = torch.frombuffer(pages, dtype=dtype, count=count).view(tuple(shape))
    address = tensor.data_ptr()
    refused = int(cudart.cudaHostRegister(address, tensor.nbytes, 0))
    if refused:
        _clear_error(launch)
        warnings.warn(
            f"{tensor.nbytes / 2**30:.2f} GiB of host memory could not be pinned (CUDA error {refused}; ulimit -l?): "
            "values are gathered by the host, which is slower",
            SkvWarning,
            stacklevel=2,
        )
    else:
        weakref.finalize(pages, cudart.cudaHostUnregister, address)
    return tensor


def _clear_error(launch: Callable[[], object]) -> None:
    """Have CUDA forget that it refused something, or torch takes the next kernel, whatever it is, for what failed.

    The runtime keeps the error until `cudaGetLastError`, which torch calls after each launch but offers nobody.
    """
    try:
        launch()
    except RuntimeError:
        return  # the refusal told once more; an error that a device does not recover from comes again by itself


def _launch() -> None:
    torch.empty(1, device="cuda").fill_(0)
