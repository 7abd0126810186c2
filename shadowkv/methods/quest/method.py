"""Quest: read only the pages whose keys could matter, judged by element-wise extremes of each page.

Paper: https://arxiv.org/abs/2406.10774. Known differences from the authors' code: the layers left dense are the first
ones of any model (theirs counts down from 32); grouped-query models work, with the reduction over a group as a
parameter; values can be kept on the host (`offload`), which is how the ShadowKV paper compares against it. The page
that holds the newest token is always read and counts towards the budget, as in the authors' engine; in their accuracy
script it competes like the others, and at least three pages are read. Bounds are those of both. The fast engine
(`paged.py`) reads chosen pages where they lie instead of copying their tokens; with `offload` there is only the
reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.engines import check_engine, means_fast, uses_fast
from shadowkv.contract.layerwise import DenseLayer, LayerState, LayerwiseMethod, StepwiseState
from shadowkv.contract.method import LayerKV, Method
from shadowkv.contract.setting import require
from shadowkv.methods.full.preallocated import ROOM_TOKENS, PreallocatedLayer
from shadowkv.methods.quest.paged import PagedLayer
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer
from shadowkv.tensors.stored import to_host


@dataclass(frozen=True)
class Quest(LayerwiseMethod):
    """budget: tokens read per step · page: tokens per page · dense_layers: first layers left full ·
    reduce: per_q_head, group_max, group_mean or group_sum · offload: values of the other layers on the host ·
    engine: reference, fast (pages read in place, CUDA graphs), or auto (fast on a GPU)."""

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "full cache, reads the pages with the largest bound on q k"
    paper: ClassVar[str] = "2406.10774"
    compared: ClassVar[str | None] = "mit-han-lab/Quest@01c1623, 2026-11-25: the same tokens, their engine and script"

    budget: int = 2048
    page: int = 16
    dense_layers: int = 2
    reduce: str = "per_q_head"
    offload: bool = False
    engine: str = "auto"

    def __post_init__(self) -> None:
        require(self.page >= 1, f"quest: page must be at least 1, got {self.page}")
        require(self.dense_layers >= 0, f"quest: dense_layers must not be negative, got {self.dense_layers}")
        require(
            self.budget >= self.page,
            f"quest: budget={self.budget} is smaller than one page of {self.page} tokens",
        )
        require(
            self.reduce in ops.GROUP_REDUCTIONS,
            f"quest: reduce={self.reduce} is unknown; one of {', '.join(ops.GROUP_REDUCTIONS)}",
        )
        check_engine(self.name, self.engine)
        require(
            self.engine != "fast" or not self.offload,
            "quest: engine=fast keeps values on the device, so it goes with offload=false only",
        )

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        dense = layer < self.dense_layers
        if uses_fast(self.engine, kv.k.device.type, copied=kv.shared) and not self.offload:
            if dense:
                return PreallocatedLayer(kv.k, kv.v)
            return PagedLayer(kv, self.page, self.budget // self.page, ops.GROUP_REDUCTIONS[self.reduce])
        return DenseLayer(kv.k, kv.v) if dense else _QuestLayer(self, kv)

    def reference(self) -> Method:
        return replace(self, engine="reference")

    def bytes_per_token(self, dims: Dims) -> Bytes:
        paged_layers = dims.layers_from(self.dense_layers)
        extremes = 2 * dims.width * dims.element_bytes * paged_layers // self.page
        host = dims.width * dims.element_bytes * paged_layers if self.offload else 0
        return Bytes(dims.full_bytes_per_token + extremes - host, host)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        choosing = dims.layers_from(self.dense_layers)
        held = tokens + later
        read = min(held, self._read_tokens)
        return (choosing * read + (dims.layers - choosing) * held) / dims.layers

    def bus_bytes(self, dims: Dims, tokens: int) -> int:
        if not self.offload:
            return 0
        choosing = dims.layers_from(self.dense_layers)
        read = self._read_tokens
        if tokens < read:  # everything is read, once for all query heads
            return choosing * dims.kv_heads * tokens * dims.head_dim * dims.element_bytes
        return choosing * dims.lists(self.reduce) * read * dims.head_dim * dims.element_bytes

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        token_bytes = dims.layers_from(self.dense_layers) * dims.width * dims.element_bytes
        host = tokens * token_bytes if self.offload else 0
        room, pages = 0, tokens // self.page
        if self._fast(dims):
            room, pages = ROOM_TOKENS, -(-(tokens + ROOM_TOKENS) // self.page)
        return {
            "keys and values": Bytes((tokens + room) * dims.full_bytes_per_token - host, host),
            "page extremes": Bytes(2 * pages * token_bytes, 0),
        }

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        if not self._fast(dims):
            return dims.gathered_bytes(self.reduce, self._read_tokens, tokens)
        scores_bytes, shared = 4, 0 if self.reduce == "per_q_head" else dims.kv_heads
        return (dims.q_heads + shared) * (tokens // self.page) * scores_bytes

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        if not self._chooses(dims, tokens):
            return tokens * dims.full_bytes_per_token
        choosing = dims.layers_from(self.dense_layers)
        dense = tokens * dims.full_bytes_per_token * (dims.layers - choosing) // dims.layers
        extremes = 2 * (tokens // self.page) * dims.width
        attended = 2 * dims.lists(self.reduce) * min(tokens, self._read_tokens) * dims.head_dim
        return dense + choosing * (extremes + attended) * dims.element_bytes

    def step_flop(self, dims: Dims, tokens: int) -> int:
        scored = tokens // self.page if self._chooses(dims, tokens) else 0
        bounds = 4 * dims.layers_from(self.dense_layers) * dims.q_heads * scored * dims.head_dim
        return super().step_flop(dims, tokens) + bounds

    def _fast(self, dims: Dims) -> bool:
        return means_fast(self.engine, dims.device) and not self.offload

    def _chooses(self, dims: Dims, tokens: int) -> bool:
        """Whether a step scores pages and reads lists of them; the fast engine does even where all are chosen."""
        return self._fast(dims) or self._read_tokens <= tokens

    @property
    def _read_tokens(self) -> int:
        """Tokens of the pages that are read."""
        return self.budget // self.page * self.page

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return replace(self, budget=(tokens // self.page + 1) * self.page, dense_layers=0)


class _QuestLayer(StepwiseState):
    def __init__(self, method: Quest, kv: LayerKV) -> None:
        self._page, self._pages_read = method.page, method.budget // method.page
        self._reduce = ops.GROUP_REDUCTIONS[method.reduce]
        self._offload = method.offload
        self._k = TokenBuffer(kv.k, axis=2)
        self._v = TokenBuffer(to_host(kv.v) if self._offload else kv.v, axis=2)
        batch, heads, tokens, head_dim = kv.k.shape
        full_pages = tokens // self._page
        paged = kv.k[:, :, : full_pages * self._page].reshape(batch, heads, full_pages, self._page, head_dim)
        self._low = TokenBuffer(paged.amin(dim=3), axis=2)
        self._high = TokenBuffer(paged.amax(dim=3), axis=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._k.append(k)
        self._v.append(v)
        keys, values = self._k.view, self._v.view
        tokens = keys.shape[2]
        current = (tokens - 1) // self._page  # the page of the newest token, read in any case
        others = self._pages_read - 1
        if others >= current:
            out = ops.attend(q, [(keys, values.to(keys.device))], scaling)
        else:
            bounds = self._reduce(ops.page_bounds(q, self._low.view[:, :, :current], self._high.view[:, :, :current]))
            index = ops.token_indices(ops.top_indices(bounds, others), self._page)
            newest = torch.arange(current * self._page, tokens, device=q.device).expand(*index.shape[:3], -1)
            out = _attend_tokens(q, keys, values, torch.cat((index, newest), dim=3), scaling)
        if tokens % self._page == 0:
            newest = keys[:, :, -self._page :]
            self._low.append(newest.amin(dim=2, keepdim=True))
            self._high.append(newest.amax(dim=2, keepdim=True))
        return out

    def nbytes(self) -> Bytes:
        device = sum(buffer.nbytes() for buffer in (self._k, self._low, self._high))
        values = self._v.nbytes()
        return Bytes(device, values) if self._offload else Bytes(device + values, 0)


def _attend_tokens(q: Tensor, keys: Tensor, values: Tensor, index: Tensor, scaling: float) -> Tensor:
    """Attention over chosen tokens. index [B,H,L,s] has L lists per KV head: 1, or one per query head."""
    batch, heads, lists, count = index.shape

    def chosen(x: Tensor) -> Tensor:
        # To `attend`, every list is a KV head of its own.
        return ops.gather_tokens(x, index.flatten(2)).view(batch, heads * lists, count, x.shape[-1])

    return ops.attend(q, [(chosen(keys), chosen(values))], scaling)
