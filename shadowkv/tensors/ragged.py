"""Tokens of a batch whose rows hold different numbers of them, in one tensor with room to grow."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from typing import Self

import torch
from torch import Tensor

from shadowkv.tensors.pinned import empty_beside
from shadowkv.tensors.registered import as_seen_by
from shadowkv.tensors.stacking import Stackable, joined_tensor

# (shape, like) -> an uninitialised tensor of that shape and of the type of `like`.
Empty = Callable[[Sequence[int], Tensor], Tensor]


class RaggedBuffer(Stackable):
    """[B,...,n,...] with n as large as the longest row needs, and `room` more; what a row does not use is undefined.

    Rows are written at places that the caller keeps. Without growth the tensor stays where it is, as a CUDA graph
    needs it.
    """

    def __init__(self, start: Tensor, axis: int, room: int, empty: Empty | None = None) -> None:
        """empty: where it is held, such as `empty_on_host`; the place is its own, or one side by side with others. By
        default it is beside `start`."""
        self._axis, self._room = axis, room
        self.data = _with_tokens(start, axis, start.shape[axis] + room, empty)

    @property
    def tokens(self) -> int:
        """Tokens that there is room for."""
        return self.data.shape[self._axis]

    def put(self, places: Tensor, x: Tensor, rows: Tensor) -> None:
        """Write x [B,...,n,...] at places [B,n] int64 of the `rows` [B] bool that are meant; there has to be room.

        One sequence of operations whatever the rows are. Nobody waits for a GPU, but where its values are in memory
        that could not be pinned, which the host has to write.
        """
        held = as_seen_by(x.device, self.data)
        places, x, rows = (each.to(held.device) for each in (places, x, rows))
        shape = [1] * x.dim()
        shape[0], shape[self._axis] = places.shape
        index = places.view(shape).expand(x.shape)
        meant = rows.view(-1, *[1] * (x.dim() - 1))
        held.scatter_(self._axis, index, torch.where(meant, x, held.gather(self._axis, index)))

    def reserve(self, tokens: int, spare: int | None = None) -> bool:
        """Make room for so many tokens, and `spare` more (default: as many as to begin with) if it has to grow.

        True if that took a larger tensor.
        """
        if tokens <= self.tokens:
            return False
        _settle(self.data)  # what is held may be read by the device until then
        self.data = _with_tokens(self.data, self._axis, tokens + (self._room if spare is None else spare))
        return True

    def shape_of_a_row(self) -> Hashable:
        shape = list(self.data.shape[1:])
        shape[self._axis - 1] = -1  # rows may differ in this
        return (self._axis, self._room, *shape, self.data.dtype, self.data.device)

    @classmethod
    def stack(cls, rows: list[RaggedBuffer]) -> RaggedBuffer:
        first = rows[0]
        joined = cls.__new__(cls)
        joined._axis, joined._room = first._axis, first._room
        side_by_side = _as_one([row.data for row in rows])
        if side_by_side is not None:
            joined.data = side_by_side
            return joined
        shape = list(first.data.shape)
        shape[0], shape[first._axis] = sum(row.data.shape[0] for row in rows), max(row.tokens for row in rows)
        joined.data = empty_beside(shape, first.data)
        begin = 0
        for row in rows:
            _settle(row.data)
            end = begin + row.data.shape[0]
            joined.data[begin:end].narrow(first._axis, 0, row.tokens).copy_(row.data)
            begin = end
        return joined

    def pick(self, rows: list[int]) -> RaggedBuffer:
        picked = copy(self)
        _settle(self.data)
        picked.data = joined_tensor([self.data[row : row + 1] for row in rows])
        return picked

    def owned(self) -> Self:
        return self  # a place among others is its own too

    def nbytes(self) -> int:
        return self.data.nbytes


class BatchLengths(Stackable):
    """How many tokens every row of a batch holds, as the host knows it; counting a step walks over no rows."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows, self._most, self._later = list(rows), max(rows), 0  # as they were `_later` tokens ago

    @property
    def rows(self) -> list[int]:
        return [tokens + self._later for tokens in self._rows]

    @property
    def most(self) -> int:
        """Of the longest row."""
        return self._most + self._later

    def append(self, tokens: int = 1) -> None:
        """Count so many more in every row."""
        self._later += tokens

    def shape_of_a_row(self) -> Hashable:
        return ()

    @classmethod
    def stack(cls, rows: list[BatchLengths]) -> BatchLengths:
        return cls([tokens for row in rows for tokens in row.rows])

    def pick(self, rows: list[int]) -> BatchLengths:
        held = self.rows
        return BatchLengths([held[row] for row in rows])


def _with_tokens(x: Tensor, axis: int, tokens: int, empty: Empty | None = None) -> Tensor:
    """A copy of x with room for `tokens`."""
    shape = list(x.shape)
    shape[axis] = tokens
    grown = (empty or empty_beside)(shape, x)
    grown.narrow(axis, 0, x.shape[axis]).copy_(x)
    return grown


def _as_one(rows: list[Tensor]) -> Tensor | None:
    """Rows [b,...] as one tensor [B,...] without a copy, where they lie side by side in one memory."""
    first = rows[0]
    place = first.storage_offset()
    for row in rows:
        elsewhere = row.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        if elsewhere or (row.storage_offset(), row.stride(), row.shape[1:]) != (place, first.stride(), first.shape[1:]):
            return None
        place += row.shape[0] * row.stride(0)
    return first.as_strided((sum(row.shape[0] for row in rows), *first.shape[1:]), first.stride())


def _settle(x: Tensor) -> None:
    """Wait until a GPU has done what it was given, where it reads or writes memory of the host by itself."""
    if x.device.type == "cpu" and torch.cuda.is_available() and x.is_pinned():
        torch.cuda.current_stream().synchronize()
