"""Tokens of a batch whose rows hold different numbers of them, in one tensor with room to grow."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

from torch import Tensor

from shadowkv.tensors.pinned import empty_beside
from shadowkv.tensors.stacking import Stackable, joined_tensor

Length = TypeVar("Length")
# (shape, like) -> an uninitialised tensor of that shape and of the type of `like`.
Empty = Callable[[Sequence[int], Tensor], Tensor]


class RaggedBuffer(Stackable):
    """[B,...,n,...] with n as large as the longest row needs, and `room` more; what a row does not use is undefined.

    Rows are written at a place that the caller keeps. Without growth the tensor stays where it is, as a CUDA graph
    needs it.
    """

    def __init__(self, start: Tensor, axis: int, room: int, empty: Empty = empty_beside) -> None:
        """empty: where it is held, such as `empty_on_host`; the place is its own, or one side by side with others."""
        self._axis, self._room = axis, room
        self.data = _with_tokens(start, axis, start.shape[axis] + room, empty)

    @property
    def tokens(self) -> int:
        """Tokens that there is room for."""
        return self.data.shape[self._axis]

    def put(self, rows: Rows, place: int, x: Tensor) -> bool:
        """Write x at `place` of these rows; True if that took a larger tensor."""
        x = x.to(self.data.device)  # before growth: what was held may still be read by the device until then
        count = x.shape[self._axis]
        grown = self.reserve(place + count)
        self.data.narrow(self._axis, place, count)[rows] = x
        return grown

    def reserve(self, tokens: int) -> bool:
        """Make room for so many tokens; True if that took a larger tensor."""
        if tokens <= self.tokens:
            return False
        self.data = _with_tokens(self.data, self._axis, tokens + self._room)
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
            end = begin + row.data.shape[0]
            joined.data[begin:end].narrow(first._axis, 0, row.tokens).copy_(row.data)
            begin = end
        return joined

    def pick(self, rows: list[int]) -> RaggedBuffer:
        picked = copy(self)
        picked.data = joined_tensor([self.data[row : row + 1] for row in rows])
        return picked

    def owned(self) -> Self:
        return self  # a place among others is its own too

    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True)
class RowLengths:
    """What the host knows of a row without asking the device."""

    tokens: int  # fed so far
    context_tokens: int  # in chunks that can be chosen, or outliers
    landmarks: int
    ring_start: int
    ring_tokens: int
    ring_room: int  # tokens of the tail beyond which its oldest chunk has to go

    def full(self, chunk: int) -> bool:
        """Whether the tail takes another token only once its oldest chunk has gone."""
        return self.ring_tokens + 1 >= self.ring_room + chunk

    def chunked(self, chunk: int, ring: int) -> RowLengths:
        """After the oldest chunk of the tail went to the context."""
        return replace(
            self,
            context_tokens=self.context_tokens + chunk,
            landmarks=self.landmarks + 1,
            ring_start=(self.ring_start + chunk) % ring,
            ring_tokens=self.ring_tokens - chunk,
        )

    def appended(self) -> RowLengths:
        """After one more token."""
        return replace(self, tokens=self.tokens + 1, ring_tokens=self.ring_tokens + 1)


class BatchLengths(Stackable, Generic[Length]):
    """What the host knows of every row of a batch: a number of tokens, or `RowLengths`."""

    def __init__(self, rows: Sequence[Length]) -> None:
        self.rows = list(rows)

    def shape_of_a_row(self) -> Hashable:
        return ()

    @classmethod
    def stack(cls, rows: list[BatchLengths[Length]]) -> BatchLengths[Length]:
        return cls([length for row in rows for length in row.rows])

    def pick(self, rows: list[int]) -> BatchLengths[Length]:
        return BatchLengths([self.rows[row] for row in rows])


# Rows of a batch: all of them, or some by number.
Rows = slice | list[int]


def _with_tokens(x: Tensor, axis: int, tokens: int, empty: Empty = empty_beside) -> Tensor:
    """A copy of x with room for `tokens`."""
    shape = list(x.shape)
    shape[axis] = tokens
    grown = empty(shape, x)
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
