"""Prefills that are not dense, and how a decode method is given one: `shadowkv+minference`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from shadowkv.method import Bytes, DecodeCache, Dims, Method, Setting
from shadowkv.rope import Rope


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
class WithPrefill(Method):
    """A decode method that starts from a prompt computed by `sparse`."""

    method: Method
    sparse: SparsePrefill

    @property
    def prefill(self) -> SparsePrefill:
        return self.sparse

    @property
    def needs_prompt_queries(self) -> bool:
        return self.method.needs_prompt_queries

    @property
    def speculates(self) -> bool:
        return self.method.speculates

    @property
    def cost_follows_text(self) -> bool:
        return True

    def new_state(self, rope: Rope) -> DecodeCache:
        return self.method.new_state(rope)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        return self.method.bytes_per_token(dims)

    def prompt_bytes(self, dims: Dims, tokens: int) -> Bytes:
        return self.method.prompt_bytes(dims, tokens)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        return self.method.attended_tokens(dims, tokens, later)

    def bus_bytes(self, dims: Dims, tokens: int) -> int:
        return self.method.bus_bytes(dims, tokens)

    def with_budget(self, tokens: int) -> Method | None:
        inner = self.method.with_budget(tokens)
        return inner and replace(self, method=inner)

    def lossless(self, dims: Dims, tokens: int) -> Method | None:
        inner = self.method.lossless(dims, tokens)
        return inner and replace(self, method=inner, sparse=self.sparse.lossless(tokens))

    def check(self, dims: Dims) -> None:
        self.method.check(dims)
        self.sparse.check(dims)

    def params(self) -> dict[str, Any]:
        """Those of the method, and those of the prefill under its name."""
        prefixed = {f"{self.sparse.name}.{key}": value for key, value in self.sparse.params().items()}
        return {**self.method.params(), **prefixed}

    @property
    def label(self) -> str:
        return f"{self.method.label}+{self.sparse.label}"
