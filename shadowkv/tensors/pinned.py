"""Host memory that a GPU can read by itself: exactly as much as is asked for, and given back when nothing uses it.

torch's own allocator of pinned memory rounds every block up to a power of two and keeps it: values of 24 sequences of
122K tokens, 6 GB per layer, would take 8.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import torch
from torch import Tensor

from shadowkv.common.errors import SkvWarning

_PIECE_BYTES = 2**26  # that a thread makes present at a time: a multiple of any page
_MOST_THREADS = 16  # clearing pages is limited by memory, not by cores
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python has no name for

# (address, bytes) -> 0, or the number of the error: pages made present for writing.
Populate = Callable[[int, int], int]


class _Pages(mmap.mmap):
    """Memory of its own, which a tensor keeps alive and which knows when it goes."""


class HostRows:
    """Host memory of a batch whose rows are built one by one: each is written where it will be in the batch.

    What is joined lies side by side then, and is neither copied nor pinned a second time (`RaggedBuffer.stack`).
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._blocks: dict[Hashable, Tensor] = {}
        self._used: dict[Hashable, int] = {}

    @property
    def taken(self) -> bool:
        """Whether the memory of all rows is taken: that of layers in turn, while the first row is built."""
        return bool(self._blocks)

    def empty(self, name: Hashable, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor [b,...] for the next rows of what is called `name`; by itself where it has no place.

        The first that is asked for says how large rows are, and takes the memory of all.
        """
        block = self._blocks.get(name)
        if block is None:
            block = self._blocks[name] = empty_on_host((self._rows, *shape[1:]), like)
        begin = self._used.get(name, 0)
        end = begin + shape[0]
        if end > block.shape[0] or block.shape[1:] != torch.Size(shape[1:]) or block.dtype != like.dtype:
            return empty_on_host(shape, like)
        self._used[name] = end
        return block[begin:end]


def empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in pinned memory or, with a warning, in plain memory where the system refuses that."""
    return _empty(shape, dtype, torch.cuda.cudart(), _launch)


def empty_on_host(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of another shape where the host can hold it: pinned from a GPU, beside one of a CPU."""
    return empty_pinned(shape, like.dtype) if like.device.type == "cuda" else empty_beside(shape, like)


def empty_beside(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of another shape where `like` is: on its device, in pinned memory if it is."""
    if like.device.type == "cpu" and torch.cuda.is_available() and like.is_pinned():
        return empty_pinned(shape, like.dtype)
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def _empty(shape: Sequence[int], dtype: torch.dtype, cudart: Any, launch: Callable[[], object]) -> Tensor:
    count = prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    pages = _pages(count * dtype.itemsize)
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


def _pages(size_bytes: int) -> _Pages:
    """Memory of this process alone, all of it present, in large pages where the system has them.

    Pages that processes share are small ones on most systems: more to clear, to register and for a GPU to look up.
    """
    pages = _Pages(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(pages, "MADV_HUGEPAGE")
    # A process that forks would copy what is pinned, page by page, for a child that has no use for it.
    _advise(pages, "MADV_DONTFORK")
    make_present(torch.frombuffer(pages, dtype=torch.uint8), _populate)
    return pages


def _advise(pages: mmap.mmap, name: str) -> None:
    advice = getattr(mmap, name, None)
    if advice is None:
        return  # not Linux
    try:
        pages.madvise(advice)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel without it
            raise


def make_present(flat: Tensor, populate: Populate) -> None:
    """Have the system find memory for every byte of `flat` [n], of type uint8, by several threads at once.

    Raises `MemoryError` where it has none. What cannot be populated for another reason is touched: older kernels and
    sandboxes do not know how.
    """

    def piece(begin: int) -> None:
        part = flat[begin : begin + _PIECE_BYTES]
        error = populate(part.data_ptr(), part.nbytes)
        if error == errno.ENOMEM:
            raise MemoryError(f"the host has no {flat.nbytes / 2**30:.2f} GiB left")
        if error:
            part[:: mmap.PAGESIZE] = 0

    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="pages") as pool:
        list(pool.map(piece, range(0, flat.nbytes, _PIECE_BYTES)))


def _populate(address: int, size_bytes: int) -> int:
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # by ctypes, for Python's own holds up other threads
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return ctypes.get_errno() if madvise(address, size_bytes, _POPULATE_WRITE) else 0


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
