"""A method that is another method with something added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.method import DecodeCache, Method, Stages

if TYPE_CHECKING:
    from shadowkv.contract.sparse_prefill import SparsePrefill


@dataclass(frozen=True)
class Wrapper(Method):
    """What a subclass does not define is the inner method's."""

    method: Method

    @property
    def core(self) -> Method:
        return self.method.core

    @property
    def needs_prompt_queries(self) -> bool:
        return self.method.needs_prompt_queries

    @property
    def speculates(self) -> bool:
        return self.method.speculates

    @property
    def cost_follows_text(self) -> bool:
        return self.method.cost_follows_text

    @property
    def prefill(self) -> SparsePrefill | None:
        return self.method.prefill

    def with_engine(self, engine: str) -> Method:
        return replace(self, method=self.method.with_engine(engine))

    def on_calibration(self, name: str | None) -> Method:
        return replace(self, method=self.method.on_calibration(name))

    def new_state(self, rope: Rope) -> DecodeCache:
        return self.method.new_state(rope)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        return self.method.bytes_per_token(dims)

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        return self.method.memory_parts(dims, tokens)

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        return self.method.workspace_bytes(dims, tokens)

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        return self.method.read_bytes(dims, tokens)

    def stages(self, dims: Dims, tokens: int) -> Stages | None:
        return self.method.stages(dims, tokens)

    def step_flop(self, dims: Dims, tokens: int) -> int:
        return self.method.step_flop(dims, tokens)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        return self.method.attended_tokens(dims, tokens, later)

    def bus_bytes(self, dims: Dims, tokens: int) -> int:
        return self.method.bus_bytes(dims, tokens)

    def with_budget(self, tokens: int) -> Method | None:
        inner = self.method.with_budget(tokens)
        return inner and replace(self, method=inner)

    def with_kv_bytes(self, dims: Dims, tokens: int, kv_bytes: int) -> Method | None:
        inner = self.method.with_kv_bytes(dims, tokens, kv_bytes)
        return inner and replace(self, method=inner)

    def lossless(self, dims: Dims, tokens: int) -> Method | None:
        inner = self.method.lossless(dims, tokens)
        return inner and replace(self, method=inner)

    def check(self, dims: Dims) -> None:
        self.method.check(dims)

    def params(self) -> dict[str, Any]:
        return self.method.params()

    def files(self) -> dict[str, Path]:
        return self.method.files()

    def notes(self) -> list[str]:
        return self.method.notes()

    @property
    def label(self) -> str:
        return self.method.label
