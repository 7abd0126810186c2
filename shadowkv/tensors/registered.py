"""Pinned memory of the host as a GPU itself reads and writes it: no copy by the host, and nobody waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_seen_by(device: torch.device, x: Tensor) -> Tensor:
    """x for operations on `device`: the same memory under that device's name if it is pinned, else x as it is.

    What is written to it is there for kernels that are queued later; the host has to wait before it looks.
    Raises `RuntimeError` for memory that another GPU registered.
    """
    if device.type != "cuda" or x.device.type != "cpu" or not x.is_pinned():
        return x
    seen = torch.as_tensor(_Registered(x), device=device)
    if seen.data_ptr() != x.data_ptr():
        raise RuntimeError(f"memory that was pinned for another GPU was copied to {device}")
    return seen.view(x.dtype).view(x.shape)


class _Registered:
    """Bytes of a contiguous tensor by the protocol through which torch adopts memory that a GPU can reach.

    With one address space for both, the address of registered memory is the device's too. What adopts it keeps this
    object, and with it the tensor. Bytes, because the protocol does not know bf16.
    """

    def __init__(self, x: Tensor) -> None:
        self._held = x.contiguous().view(-1).view(torch.uint8)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": tuple(self._held.shape),
            "typestr": "|u1",
            "data": (self._held.data_ptr(), False),
            "strides": None,
            "version": 3,
        }
