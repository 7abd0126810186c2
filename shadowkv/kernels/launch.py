"""What kernels of this package have in common: sizes of blocks, checks of layout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowkv.common.errors import SkvError

LARGEST_HEAD = 256
_COLUMNS_ALIGNED = 16  # what Triton's launcher asks of a size before it tells the compiler
_PROCESSORS, _SHARED_BYTES = 132, 228 * 2**10  # of an H100 or H200, and of each of its processors
_RESERVED_BYTES = 2**10  # of shared memory, for every program
_MOST_TURNS = 4  # beyond, what is gained by even turns is lost to beginning and ending


@triton.jit
def product(a, b, total, INTERPRETED: tl.constexpr):
    """a @ b + total, exact products, summed in fp32."""
    if INTERPRETED:
        # The interpreter multiplies the bits of bf16 numbers as if they were integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_queries(q, row, group, head_dim, g, d):
    """The query heads g of a row, channels d; zeros beyond `group` and `head_dim`. q [rows,group,head_dim], dense."""
    known = (g[:, None] < group) & (d[None, :] < head_dim)
    return tl.load(q + (row * group + g[:, None]) * head_dim + d[None, :], mask=known, other=0.0)


def padded(size: int, least: int = 16) -> int:
    """The next power of two, and 16 at least: what tl.dot takes."""
    power: int = triton.next_power_of_2(size)
    return max(least, power)


def check_head_dim(head_dim: int) -> None:
    """Raise `SkvError` for heads that no kernel was made for."""
    if head_dim > LARGEST_HEAD:
        raise SkvError(
            f"the fast engine takes heads of up to {LARGEST_HEAD} channels, not {head_dim}: engine=reference"
        )


def wide_rows(*shape: int, device: torch.device) -> Tensor:
    """fp32 of this shape, not written yet, whose rows begin where a thread can read 16 bytes at once."""
    *rows, columns = shape
    return torch.empty(*rows, _wide(columns), dtype=torch.float32, device=device)[..., :columns]


def readable_columns(x: Tensor) -> int:
    """How many elements may be read from the start of every row of x: of `wide_rows` also those that fill it up."""
    last = x.storage_offset() + sum((size - 1) * step for size, step in zip(x.shape[:-1], x.stride(), strict=False))
    wide = _wide(x.shape[-1])
    return wide if last + wide <= x.untyped_storage().nbytes() // x.itemsize else x.shape[-1]


def _wide(columns: int) -> int:
    return -(-columns // _COLUMNS_ALIGNED) * _COLUMNS_ALIGNED


def rows_of(x: Tensor, inner: int) -> tuple[int, ...]:
    """Strides of all axes but the last `inner`, which have to lie densely, as the kernels read them."""
    expected = 1
    for axis in range(x.dim() - 1, x.dim() - 1 - inner, -1):
        if x.shape[axis] != 1 and x.stride(axis) != expected:
            raise ValueError(f"the last {inner} axes of shape {list(x.shape)} must be contiguous")
        expected *= x.shape[axis]
    return x.stride()[: x.dim() - inner]


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere, where kernels are interpreted or only compiled, those of an H100."""
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs_at_once(shared_bytes: int, device: torch.device) -> int:
    """How many programs that take so much shared memory each run at a time; elsewhere than on a GPU, on an H100."""
    held = _SHARED_BYTES
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return processors(device) * max(1, held // (shared_bytes + _RESERVED_BYTES))


def blocks_each(blocks: int, rows: int, at_once: int, most_programs: int) -> int:
    """How many of a row's blocks each of its programs takes, so that those of all rows are done soonest.

    They run `at_once` at a time, each for as long as it has blocks, and begins and ends in the time of one more. A row
    has up to `most_programs`.
    """

    def taken(each: int) -> int:
        return -(-rows * -(-blocks // each) // at_once) * (each + 1)

    asked = (max(1, min(turns * at_once // rows, blocks, most_programs)) for turns in range(1, _MOST_TURNS + 1))
    return min((-(-blocks // programs) for programs in asked), key=taken)
