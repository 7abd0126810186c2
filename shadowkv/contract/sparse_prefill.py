"""A way to compute a prompt that is not dense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from shadowkv.common.dims import Dims
from shadowkv.contract.setting import Setting


@dataclass(frozen=True)
class SparsePrefill(Setting, ABC):
    """A way to compute a prompt in which queries do not read every earlier token; all keys and values are kept."""

    @abstractmethod
    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Causal attention of one prefill chunk. q [B,Hq,T,D] of the last T tokens of k, v [B,H,n,D]. Returns like q.

        Must not depend on the number of rows, nor on anything that comes after the chunk.
        """

    @abstractmethod
    def lossless(self, tokens: int) -> SparsePrefill:
        """The setting that equals a dense prefill of up to `tokens` tokens."""

    def check(self, dims: Dims) -> None:
        """Raise `SkvError` if these parameters cannot work on a model of this geometry."""
