"""PyramidKV: SnapKV with more tokens for the first layers and fewer for the last ones, as many in all.

Paper: https://arxiv.org/abs/2406.02069. Known differences from the authors' code, beside those of SnapKV:
- budgets are rounded layer by layer and not by an integer step, so that their mean is `budget`; theirs is larger
  wherever the layers do not divide the slope, and the same to a token where they do;
- depth counts the layers that a method serves, so sliding-window layers have no part in the pyramid;
- scores of a group are pooled and then averaged, as for SnapKV. Theirs are chosen per query head; where told to keep
  one set per KV head, they average first. With the mean and pooling=avg that is the same.
As theirs, there is no pyramid for a prompt of less than 2 (budget - window) tokens: every layer keeps `budget`. For one
a little longer than that, which the first layer would keep whole and have room left, the pyramid is flatter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.method import depth_of
from shadowkv.contract.setting import require
from shadowkv.methods.eviction.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """budget: prompt tokens kept, the mean over layers · window, kernel, pooling, reduce: as for snapkv ·
    beta: how steep, the last layer keeping 1/beta of the mean beside its window (1: snapkv)."""

    name: ClassVar[str] = "pyramidkv"
    summary: ClassVar[str] = "snapkv with budgets that fall from the first layer to the last"
    paper: ClassVar[str] = "2406.02069"
    compared: ClassVar[str | None] = "Zefan-Cai/KVCache-Factory@c97f9d7, 2026-11-25: same tokens in every layer"

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 1, f"pyramidkv: beta must be at least 1, got {self.beta}")

    def layer_budget(self, depth: float, tokens: int) -> int:
        mean = self.budget - self.window
        if tokens < 2 * mean:
            return self.budget
        first = min(2 * mean - mean // self.beta, max(tokens - self.window, mean))
        last = 2 * mean - first
        return self.window + round(first - depth * (first - last))

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        depths = [depth_of(place, dims.layers) for place in range(dims.layers)]
        return sum(min(tokens, self.layer_budget(depth, tokens)) for depth in depths) / dims.layers + later

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        return {"keys and values": Bytes(round(self.attended_tokens(dims, tokens) * dims.full_bytes_per_token), 0)}
