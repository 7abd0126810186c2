"""The operations of a decode step on a device: Triton kernels, or their plain-torch twins. Chosen in one place."""

from __future__ import annotations

from types import ModuleType

import torch

from shadowkv.common.errors import SkvError
from shadowkv.kernels import slots
from shadowkv.kernels.backend import has_triton, interpreted


def operations(device: torch.device) -> ModuleType:
    """Kernels on a GPU, or anywhere under Triton's interpreter; plain torch otherwise.

    Raises `SkvError` where kernels are needed and Triton is missing.
    """
    if device.type != "cuda" and not interpreted():
        return slots
    if not has_triton():
        raise SkvError("the fast engine needs Triton: pip install 'skv[gpu]', or use engine=reference")
    from shadowkv.kernels import twins

    return twins
