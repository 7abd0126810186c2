"""A decode method that is given a prefill which is not dense: `shadowkv+minference`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shadowkv.common.dims import Dims
from shadowkv.contract.method import Method
from shadowkv.contract.sparse_prefill import SparsePrefill
from shadowkv.contract.wrapper import Wrapper


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
