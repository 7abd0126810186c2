"""Triton twins of `shadowkv.kernels.slots`: the same names and signatures, chosen in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch

from shadowkv.common.errors import SkvError


@dataclass(frozen=True)
class CompiledKernel:
    """What one variant of a kernel takes of one GPU. Stack is where registers go that there are too few of."""

    kernel: str
    variant: str
    target: str
    registers: int
    stack_bytes: int
    shared_bytes: int


def has_triton() -> bool:
    """Whether kernels can be compiled here at all."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of a CPU: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def operations(device: torch.device) -> ModuleType:
    """Kernels on a GPU, or anywhere under Triton's interpreter; plain torch otherwise.

    Raises `SkvError` where kernels are needed and Triton is missing.
    """
    if device.type != "cuda" and not interpreted():
        from shadowkv.kernels import slots

        return slots
    if not has_triton():
        raise SkvError("the fast engine needs Triton: pip install 'skv[gpu]', or use engine=reference")
    from shadowkv.kernels import twins

    return twins
