"""The fast engine of Quest: pages are scored, chosen and attended to where they lie, in one sequence of operations.

Equal to the reference in `method.py`: the same bounds choose the same pages. The newest page scores +inf
instead of being added afterwards, and its extremes follow every token instead of being taken once it is full, so that
a step has the same shapes whatever the lengths are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shadowkv.common.dims import Bytes
from shadowkv.contract.layerwise import SteadyState
from shadowkv.contract.method import LayerKV
from shadowkv.kernels.operations import operations
from shadowkv.methods.full.preallocated import ROOM_TOKENS
from shadowkv.tensors.ragged import BatchLengths, RaggedBuffer


class PagedLayer(SteadyState):
    """One layer of a batch whose rows may have prompts of different lengths. Keys and values are copied."""

    def __init__(self, kv: LayerKV, page: int, pages_read: int, reduce: Callable[[Tensor], Tensor]) -> None:
        self._page, self._pages_read, self._reduce = page, pages_read, reduce
        self._k, self._v = (RaggedBuffer(x, 2, ROOM_TOKENS) for x in (kv.k, kv.v))
        # Without room of their own: they grow with the tokens (`make_room`).
        self._low, self._high = (RaggedBuffer(x, 2, 0) for x in page_extremes(kv.k, self._page))
        self._reserve_pages()
        batch, tokens = kv.k.shape[0], kv.k.shape[2]
        self._tokens = torch.full((batch,), tokens, dtype=torch.int32, device=kv.k.device)
        self._lengths = BatchLengths([tokens] * batch)

    def reserve(self, tokens: int) -> None:
        for buffer in (self._k, self._v):
            buffer.reserve(self._lengths.most + tokens, spare=0)
        self._reserve_pages()

    def make_room(self) -> bool:
        needed = self._lengths.most + 1
        moved = [buffer.reserve(needed) for buffer in (self._k, self._v)]
        self._reserve_pages()
        self._lengths.append()
        return any(moved)

    def run(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        kernels = operations(q.device)
        self._append(k, v)
        bounds = kernels.page_bounds(q, self._low.data, self._high.data, self._tokens, self._page)
        scores = self._reduce(bounds).flatten(1, 2)
        numbers = torch.arange(scores.shape[-1], dtype=torch.int32, device=q.device).expand(scores.shape)
        pages = kernels.choose_chunks(scores, numbers, self._pages_read)
        out: Tensor = kernels.attend_pages(q, self._k.data, self._v.data, pages, self._tokens, self._page, scaling)
        return out

    def _append(self, k: Tensor, v: Tensor) -> None:
        place = self._tokens.long()[:, None, None, None]
        for buffer, new in ((self._k, k), (self._v, v)):
            buffer.data.scatter_(2, place.expand(new.shape), new)
        number, opens = (place // self._page).expand(k.shape), place % self._page == 0
        for buffer, extreme in ((self._low, torch.minimum), (self._high, torch.maximum)):
            followed = extreme(buffer.data.gather(2, number), k)
            buffer.data.scatter_(2, number, torch.where(opens, k, followed))
        self._tokens += 1

    def _reserve_pages(self) -> None:
        """Room for the pages of all tokens that there is room for, so that everything grows in the same step."""
        for buffer in (self._low, self._high):
            buffer.reserve(-(-self._k.tokens // self._page))

    def nbytes(self) -> Bytes:
        buffers = (self._k, self._v, self._low, self._high)
        return Bytes(sum(buffer.nbytes() for buffer in buffers) + self._tokens.nbytes, 0)


def page_extremes(keys: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Least and largest element of each page, the last of which need not be full. [B,H,n,D] -> [B,H,ceil(n/page),D]."""
    full = keys.shape[2] // page * page
    pages, rest = keys[:, :, :full].unflatten(2, (full // page, page)), keys[:, :, full:].unsqueeze(2)
    parts = [part for part in (pages, rest) if part.shape[2] and part.shape[3]]
    low, high = (torch.cat([extreme(part, dim=3) for part in parts], dim=2) for extreme in (torch.amin, torch.amax))
    return low, high
