"""Rows that were built one by one, joined into one batch and taken out of it: attribute by attribute.

Nothing here knows a method. A tensor with the batch first is concatenated, a container item by item, an object that
is `Stackable` attribute by attribute; anything else is a setting, and has to be the same in every row.
"""

from __future__ import annotations

from collections.abc import Hashable
from copy import copy
from functools import singledispatch
from typing import Any, Self

import torch
from torch import Tensor

from shadowkv.tensors.pinned import empty_beside


class Stackable:
    """An object whose attributes are tensors with the batch first, other stackables, or settings."""

    def shape_of_a_row(self) -> Hashable:
        """Equal for two rows if and only if they can be one batch."""
        return tuple((name, row_shape(value)) for name, value in sorted(vars(self).items()))

    @classmethod
    def stack(cls, rows: list[Self]) -> Self:
        """One object in place of all rows, in tensors of its own. The rows are emptied on the way."""
        joined = cls.__new__(cls)
        for name in list(vars(rows[0])):
            setattr(joined, name, stack([vars(row).pop(name) for row in rows]))
        return joined

    def pick(self, rows: list[int]) -> Self:
        """These rows of a batch, in this order, in tensors of their own."""
        picked = copy(self)
        for name, value in vars(self).items():
            setattr(picked, name, pick(value, rows))
        return picked

    def owned(self) -> Self:
        """The same object, its attributes without views of larger tensors. See `owned`."""
        for name, value in vars(self).items():
            setattr(self, name, owned(value))
        return self


def can_stack(rows: list[Any]) -> bool:
    """Whether rows differ in nothing but what their tensors hold."""
    return all(row_shape(row) == row_shape(rows[0]) for row in rows[1:])


def stack(rows: list[Any]) -> Any:
    """The rows as one batch, copied: nothing in it is a view of what they were made from. See `can_stack`."""
    return _stack(rows[0], rows)


@singledispatch
def pick(thing: Any, rows: list[int]) -> Any:
    """Some rows of what `stack` made; of a setting, the setting itself."""
    return thing


@pick.register
def _(thing: Tensor, rows: list[int]) -> Tensor:
    return joined_tensor([thing[row : row + 1] for row in rows]) if thing.dim() else thing


@pick.register
def _(thing: tuple, rows: list[int]) -> Any:  # type: ignore[type-arg]
    items = [pick(item, rows) for item in thing]
    return type(thing)(*items) if hasattr(thing, "_fields") else tuple(items)


@pick.register
def _(thing: list, rows: list[int]) -> Any:  # type: ignore[type-arg]
    return [pick(item, rows) for item in thing]


@pick.register
def _(thing: dict, rows: list[int]) -> Any:  # type: ignore[type-arg]
    return {key: pick(item, rows) for key, item in thing.items()}


@pick.register
def _(thing: Stackable, rows: list[int]) -> Any:
    return thing.pick(rows)


@singledispatch
def owned(thing: Any) -> Any:
    """The same without any view of a larger tensor, which it would keep alive: those are copied."""
    return thing


@owned.register
def _(thing: Tensor) -> Tensor:
    return joined_tensor([thing]) if thing.dim() and thing.untyped_storage().nbytes() > thing.nbytes else thing


@owned.register
def _(thing: tuple) -> Any:  # type: ignore[type-arg]
    items = [owned(item) for item in thing]
    return type(thing)(*items) if hasattr(thing, "_fields") else tuple(items)


@owned.register
def _(thing: list) -> Any:  # type: ignore[type-arg]
    return [owned(item) for item in thing]


@owned.register
def _(thing: dict) -> Any:  # type: ignore[type-arg]
    return {key: owned(item) for key, item in thing.items()}


@owned.register
def _(thing: Stackable) -> Any:
    return thing.owned()


def joined_tensor(rows: list[Tensor]) -> Tensor:
    """Tensors one after the other along the first axis, in pinned memory if they are."""
    shape = (sum(row.shape[0] for row in rows), *rows[0].shape[1:])
    return torch.cat(rows, out=empty_beside(shape, rows[0]))


@singledispatch
def row_shape(thing: Any) -> Hashable:
    """What must be equal for rows to be one batch: of a setting, the setting itself."""
    return thing if isinstance(thing, Hashable) else id(thing)


@row_shape.register
def _(thing: Tensor) -> Hashable:
    # A number in a tensor has no batch to be joined along.
    return (thing.shape[1:], thing.dtype, thing.device) if thing.dim() else id(thing)


@row_shape.register(tuple)
@row_shape.register(list)
def _(thing: Any) -> Hashable:
    return (type(thing), *map(row_shape, thing))


@row_shape.register
def _(thing: dict) -> Hashable:  # type: ignore[type-arg]
    return tuple((key, row_shape(value)) for key, value in thing.items())


@row_shape.register
def _(thing: Stackable) -> Hashable:
    return (type(thing), thing.shape_of_a_row())


@singledispatch
def _stack(first: Any, rows: list[Any]) -> Any:
    return first


@_stack.register
def _(first: Tensor, rows: list[Tensor]) -> Any:
    return joined_tensor(rows)


@_stack.register
def _(first: tuple, rows: list[Any]) -> Any:  # type: ignore[type-arg]
    items = [stack(list(column)) for column in zip(*rows, strict=True)]
    return type(first)(*items) if hasattr(first, "_fields") else tuple(items)


@_stack.register
def _(first: list, rows: list[Any]) -> Any:  # type: ignore[type-arg]
    return [stack(list(column)) for column in zip(*rows, strict=True)]


@_stack.register
def _(first: dict, rows: list[Any]) -> Any:  # type: ignore[type-arg]
    return {key: stack([row.pop(key) for row in rows]) for key in list(first)}


@_stack.register
def _(first: Stackable, rows: list[Any]) -> Any:
    return type(first).stack(rows)
