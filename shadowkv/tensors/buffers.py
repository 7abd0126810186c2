"""A growable run of tokens that starts as a read-only view of the prefill and copies it only when it must change."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from shadowkv.tensors.pinned import empty_beside
from shadowkv.tensors.stacking import Stackable, joined_tensor, row_shape


class TokenBuffer(Stackable):
    """Tokens along one axis of a tensor, appended at the end, dropped at the front or overwritten.

    Growth is by a fixed number of tokens, so that what is held stays close to what is used (`nbytes` counts all
    of it) and appending stays cheap.
    """

    def __init__(self, start: Tensor, axis: int, grow_tokens: int = 256) -> None:
        # A view without tokens must not keep alive what it is a view of.
        self._data = start if start.shape[axis] else start.clone()
        self._axis = axis
        self._grow_tokens = grow_tokens
        self._first = 0
        self._end = start.shape[axis]
        self._owned = False

    def __len__(self) -> int:
        return self._end - self._first

    @property
    def view(self) -> Tensor:
        """The tokens held; never written to by the reader."""
        return self._data.narrow(self._axis, self._first, len(self))

    def append(self, x: Tensor) -> None:
        """Add x, shaped like the buffer but for the token axis."""
        count = x.shape[self._axis]
        if not self._owned or self._end + count > self._data.shape[self._axis]:
            self._grow(count)
        self._data.narrow(self._axis, self._end, count).copy_(x)
        self._end += count

    def put(self, index: Tensor, x: Tensor) -> None:
        """Write x over one token per head. Buffer [B,H,n,D], index [B,H,1], x [B,H,1,D]."""
        if not self._owned:
            self._data, self._first, self._end, self._owned = self.view.clone(), 0, len(self), True
        self.view.scatter_(self._axis, index[..., None].expand(x.shape), x)

    def drop_front(self, count: int) -> None:
        """Forget the oldest tokens; their space is used again at the next growth."""
        assert count <= len(self)
        self._first += count

    def shape_of_a_row(self) -> Hashable:
        return (self._axis, self._grow_tokens, row_shape(self.view))

    @classmethod
    def stack(cls, rows: list[TokenBuffer]) -> TokenBuffer:
        joined = cls(joined_tensor([row.view for row in rows]), rows[0]._axis, rows[0]._grow_tokens)
        joined._owned = True
        return joined

    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        held = self._data if self._owned else self.view
        return held.nbytes

    def _grow(self, count: int) -> None:
        shape = list(self._data.shape)
        shape[self._axis] = len(self) + count + self._grow_tokens
        grown = empty_beside(shape, self._data)
        grown.narrow(self._axis, 0, len(self)).copy_(self.view)
        self._first, self._end = 0, len(self)
        self._data, self._owned = grown, True
