"""What Triton can do here: compile kernels, interpret them, or nothing; and what a compiled one takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class CompiledKernel:
    """What one variant of a kernel takes of one GPU. Stack is where registers go that there are too few of.

    `narrow_loads` are the instructions by which a thread reads less than 4 bytes of global memory: many of them, where
    what threads read does not lie side by side. None in folders of before they were counted.
    """

    kernel: str
    variant: str
    target: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    narrow_loads: int | None = None


def has_triton() -> bool:
    """Whether kernels can be compiled here at all."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of a CPU: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
