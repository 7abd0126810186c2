"""Prefills that are not dense, and how a decode method is given one: `shadowkv+minference`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from shadowkv.common.dims import Dims
from shadowkv.contract.method import Method, Setting
from shadowkv.contract.wrapper import Wrapper


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


@dataclass(frozen=True)
class WithPrefill(Wrapper):
    """A decode method that starts from a prompt computed by `sparse`."""

    sparse: SparsePrefill

    @property
    def prefill(self) -> SparsePrefill:
        return self.sparse

    @property
    def cost_follows_text(self) -> bool:
        return True

    def lossless(self, dims: Dims, tokens: int) -> Method | None:
        inner = self.method.lossless(dims, tokens)
        return inner and replace(self, method=inner, sparse=self.sparse.lossless(tokens))

    def check(self, dims: Dims) -> None:
        super().check(dims)
        self.sparse.check(dims)

    def params(self) -> dict[str, Any]:
        """Those of the method, and those of the prefill under its name."""
        prefixed = {f"{self.sparse.name}.{key}": value for key, value in self.sparse.params().items()}
        return {**super().params(), **prefixed}

    def files(self) -> dict[str, Path]:
        return {**super().files(), **{f"{self.sparse.name}.{key}": path for key, path in self.sparse.files().items()}}

    @property
    def label(self) -> str:
        return f"{super().label}+{self.sparse.label}"
