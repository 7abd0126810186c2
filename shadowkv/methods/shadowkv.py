"""ShadowKV: low-rank pre-RoPE keys on the device, values on the host, a few chunks rebuilt per step.

Paper: https://arxiv.org/abs/2410.21465. Known differences from the authors' code:
- every selected key is rebuilt from its factors at every step, so a result does not depend on which chunks an
  earlier step happened to hold (their fast path keeps exact keys for as long as a chunk stays selected);
- all prompt chunks but the newest `local` ones are candidates, whatever the prompt's length;
- outlier chunks scale with the budget (24 per 1024 tokens) instead of being 48, or 0 below a budget of 1024;
- keys are centred before the factorisation, which is by the Gram matrix in fp64 instead of a full SVD;
- generated tokens never run out of room: the newest `window` stay exact, older ones become chunks, projected on
  the prompt's basis. They are not searched for outliers;
- values can be kept in 8 bits on the host (`values`), which halves what a step fetches; theirs are bf16;
- several new tokens at once (a second turn) each choose their own chunks, as they would one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shadowkv import low_rank, ops
from shadowkv.buffers import TokenBuffer
from shadowkv.host import CODINGS, HostTokens
from shadowkv.landmarks import Landmarks, SelectsChunks
from shadowkv.layerwise import LayerState, LayerwiseMethod, StepwiseState
from shadowkv.method import Bytes, Dims, LayerKV, Method, largest_within, require
from shadowkv.rope import Rope


@dataclass(frozen=True)
class ShadowKV(LayerwiseMethod, SelectsChunks):
    """rank: directions kept of a layer's keys · budget: tokens rebuilt per step · chunk: tokens per landmark ·
    local: newest prompt chunks kept exact · outliers: badly summarised chunks kept exact (auto: 24 per 1024 of
    budget) · energy: choose the rank per layer by this share of the squared norm, instead of rank (0: off) ·
    window: newest generated tokens kept exact · values: native, int8 or fp8 on the host."""

    name: ClassVar[str] = "shadowkv"
    summary: ClassVar[str] = "low-rank keys on the device, values on the host, landmark-selected chunks rebuilt"
    paper: ClassVar[str] = "2410.21465"

    rank: int = 160
    energy: float = 0.0
    window: int = 128
    values: str = "native"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, f"shadowkv: rank must be at least 1, got {self.rank}")
        require(self.window >= 1, f"shadowkv: window must be at least 1, got {self.window}")
        require(0 <= self.energy <= 1, f"shadowkv: energy={self.energy} is not in [0, 1]")
        require(
            not self.energy or self.rank == ShadowKV.rank,
            "shadowkv: give either rank or energy, not both",
        )
        require(
            self.values in CODINGS,
            f"shadowkv: values={self.values} is unknown; one of {', '.join(CODINGS)}",
        )

    @property
    def cost_follows_text(self) -> bool:
        return bool(self.energy)

    def check(self, dims: Dims) -> None:
        require(
            bool(self.energy) or self.rank <= dims.width,
            f"shadowkv: rank={self.rank} exceeds the width of this model's keys, {dims.width} "
            f"({dims.kv_heads} KV heads of {dims.head_dim}); give rank={dims.width} or less",
        )

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        return _ShadowLayer(self, layer, kv, rope)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        # With `energy` the rank depends on the prompt; the full width is its upper bound.
        rank = dims.width if self.energy else self.rank
        per_layer = (rank + dims.width / self.chunk) * dims.element_bytes + dims.kv_heads * 4 / self.chunk
        value_bytes = CODINGS[self.values].token_bytes(dims.head_dim, dims.element_bytes)
        return Bytes(round(dims.layers * per_layer), dims.layers * dims.kv_heads * value_bytes)

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        context, exact = self.context_tokens(tokens), self.exact_tokens(tokens)
        rank = dims.width if self.energy else self.rank
        basis = (rank + 1) * dims.width  # directions and mean of the keys
        factors = dims.layers * (context * rank + basis) * dims.element_bytes
        number_bytes = 4  # which chunk a landmark stands for
        landmark = dims.width * dims.element_bytes + dims.kv_heads * number_bytes
        return {
            "factors": Bytes(factors, 0),
            "landmarks": Bytes(dims.layers * self.landmarks(tokens) * landmark, 0),
            "outlier and local tokens": Bytes(exact * dims.full_bytes_per_token, 0),
            "values": Bytes(0, context * self.bytes_per_token(dims).host),
        }

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        chunks = self.budget // self.chunk + self.outlier_chunks + self.local
        # Of later tokens the newest stay exact, and the others become chunks to choose from.
        exact = tokens % self.chunk + min(later, self.window + self.chunk - 1)
        return min(tokens + later, chunks * self.chunk + exact)

    def bus_bytes(self, dims: Dims, tokens: int) -> int:
        coding = CODINGS[self.values].token_bytes(dims.head_dim, dims.element_bytes)
        return dims.layers * dims.kv_heads * self.chosen_tokens(tokens) * coding

    def workspace_bytes(self, dims: Dims, tokens: int) -> int:
        return 2 * self.chosen_tokens(tokens) * dims.width * dims.element_bytes

    def read_bytes(self, dims: Dims, tokens: int) -> int:
        rank = dims.width if self.energy else self.rank
        # Every head rebuilds its own tokens, from rows of the coefficients that all heads share.
        rows = dims.kv_heads * self.chosen_tokens(tokens) * rank
        factors = dims.layers * (rows + (rank + 1) * dims.width) * dims.element_bytes
        landmarks = self.memory_parts(dims, tokens)["landmarks"].device
        return landmarks + factors + round(self.attended_tokens(dims, tokens) * dims.full_bytes_per_token)

    def step_flop(self, dims: Dims, tokens: int) -> int:
        rank = dims.width if self.energy else self.rank
        scored = dims.q_heads * self.landmarks(tokens)
        rebuilt = dims.kv_heads * self.chosen_tokens(tokens) * rank
        return super().step_flop(dims, tokens) + 2 * dims.layers * dims.head_dim * (scored + rebuilt)

    def with_budget(self, tokens: int) -> Method:
        return self.within_budget(tokens)

    def with_kv_bytes(self, dims: Dims, tokens: int, kv_bytes: int) -> Method:
        return largest_within(lambda n: replace(self, rank=n, energy=0.0), 1, dims.width, dims, tokens, kv_bytes)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        budget = -(-tokens // self.chunk) * self.chunk
        return replace(self, rank=dims.width, energy=0.0, budget=budget, outliers=2, window=16, values="native")


class _ShadowLayer(StepwiseState):
    """Tokens [0, context) are chunks: factors and landmarks here, values on the host. The rest is the exact tail."""

    def __init__(self, method: ShadowKV, layer: int, kv: LayerKV, rope: Rope) -> None:
        self._layer, self._rope = layer, rope
        self._chunk, self._chunks_read = method.chunk, method.budget // method.chunk
        tokens = kv.k.shape[2]
        self._context_tokens = method.context_tokens(tokens)
        self._tail_room = tokens - self._context_tokens + method.window
        self._tokens = tokens

        keys, values = kv.k[:, :, : self._context_tokens], kv.v[:, :, : self._context_tokens]
        pre_rope = self._pre_rope(kv.k, first=0)
        basis = low_rank.fit(pre_rope, method.rank, method.energy)
        coefficients = basis.project(pre_rope[:, : self._context_tokens]).to(kv.k.dtype)
        self._coefficients = TokenBuffer(coefficients, axis=1)
        self._basis = low_rank.Basis(*(x.to(kv.k.dtype) for x in basis))
        self._values = HostTokens(values, method.values)

        self._landmarks, outliers = Landmarks.of(keys, method.chunk, method.outlier_chunks)
        self._outlier_k, self._outlier_v = ops.gather_tokens(keys, outliers), ops.gather_tokens(values, outliers)
        self._tail_k = TokenBuffer(kv.k[:, :, self._context_tokens :], axis=2)
        self._tail_v = TokenBuffer(kv.v[:, :, self._context_tokens :], axis=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self._tail_k.append(k)
        self._tail_v.append(v)
        self._tokens += 1
        if len(self._tail_k) >= self._tail_room + self._chunk:
            self._chunk_oldest_tail()
        exact = [(self._outlier_k, self._outlier_v), (self._tail_k.view, self._tail_v.view)]
        if not len(self._landmarks):
            return ops.attend(q, exact, scaling)
        return ops.attend(q, [self._select(q, scaling), *exact], scaling)

    def _select(self, q: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Keys and values of the chunks that matter most to q, rebuilt and fetched. [B,H,s,D] each."""
        index = self._landmarks.choose(q, self._chunks_read, scaling)
        k = ops.rebuild(self._coefficients.view, *self._basis, index)
        k = self._rope.rotate(self._layer, k, index, self._tokens)
        return k, self._values.gather(index)

    def _chunk_oldest_tail(self) -> None:
        """Move the oldest chunk of the tail into the context, as if the prompt had ended after it."""
        keys = self._tail_k.view[:, :, : self._chunk].clone()
        values = self._tail_v.view[:, :, : self._chunk]
        coefficients = self._basis.project(self._pre_rope(keys, first=self._context_tokens))
        self._coefficients.append(coefficients.to(keys.dtype))
        self._values.append(values)
        self._landmarks.append(keys, self._context_tokens // self._chunk)
        self._tail_k.drop_front(self._chunk)
        self._tail_v.drop_front(self._chunk)
        self._context_tokens += self._chunk

    def _pre_rope(self, keys: Tensor, first: int) -> Tensor:
        """Keys of consecutive positions from `first` on, before RoPE. [B,H,n,D] -> [B,n,W] fp32."""
        positions = torch.arange(first, first + keys.shape[2], device=keys.device)
        return self._rope.unrotate(self._layer, keys, positions, self._tokens).transpose(1, 2).flatten(2)

    def nbytes(self) -> Bytes:
        buffers = (self._coefficients, self._landmarks, self._tail_k, self._tail_v)
        tensors = (*self._basis, self._outlier_k, self._outlier_v)
        device = sum(b.nbytes() for b in buffers) + sum(t.nbytes for t in tensors)
        return Bytes(device, self._values.nbytes())
