"""DuoAttention: some KV heads keep the whole context, the others only its first tokens and the newest ones.

Paper: https://arxiv.org/abs/2410.10819. Known differences from the authors' code:
- their gates are trained once per model. `heads=NAME` takes what `skv calibrate duo` trained like them, on fewer and
  shorter texts (head of `shadowkv/methods/heads/gate_training.py`); `heads=FILE` a table such as theirs
  (`full_attention_heads.tsv`). Without either, heads are judged on the prompt itself, without training: by the most
  that any of its last queries attends to one token outside the sinks and the recent ones. A KV head is worth what its
  best query head is worth;
- `recent` counts the newest token, as in their training; their engine keeps that many before it;
- ties go to the earlier head; theirs are broken by noise;
- heads keep their order and weights stay untouched; theirs are permuted at load;
- the prefill is dense in all heads, however long; theirs is in one pass, and streams in the chunked demo.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.common.errors import SkvError
from shadowkv.common.home import sha256_of
from shadowkv.common.reading import read_text
from shadowkv.contract.calibration import calibration_file, load_calibration
from shadowkv.contract.layerwise import DenseLayer, LayeredCache, LayerState, StepwiseState
from shadowkv.contract.method import DecodeCache, LayerKV, Method, largest_within
from shadowkv.contract.setting import require
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer

_TABLES = (".tsv", ".txt", ".json")  # any other name is a calibration's


@dataclass(frozen=True)
class Duo(Method):
    """retrieval: share of all KV heads that keep everything · sinks: first tokens kept by the other heads ·
    recent: newest tokens kept by the other heads · heads: gates by `skv calibrate`, a name or .safetensors file, or a
    table of them, layers x KV heads, in a .tsv, .txt or .json file (auto: judged on the prompt)."""

    name: ClassVar[str] = "duo"
    summary: ClassVar[str] = "retrieval heads keep everything, the others sinks and the newest tokens"
    paper: ClassVar[str] = "2410.10819"
    compared: ClassVar[str | None] = (
        "mit-han-lab/duo-attention@fe93c31, 2026-11-25: same heads and tokens, by their engine and by their training"
    )
    calibration: ClassVar[str | None] = "heads"

    retrieval: float = 0.5
    sinks: int = 128
    recent: int = 256
    heads: str | None = None

    def __post_init__(self) -> None:
        require(0 <= self.retrieval <= 1, f"duo: retrieval={self.retrieval} is not in [0, 1]")
        require(self.sinks >= 0, f"duo: sinks must not be negative, got {self.sinks}")
        require(self.recent >= 1, f"duo: recent must be at least 1, got {self.recent}")

    @property
    def _table(self) -> bool:
        """Whether `heads` is a file of gates and not a calibration."""
        return self.heads is not None and Path(self.heads).suffix in _TABLES

    def files(self) -> dict[str, Path]:
        if self.heads is None:
            return {}
        return {"heads": Path(self.heads).expanduser() if self._table else calibration_file(self.name, self.heads)}

    def notes(self) -> list[str]:
        if self.heads is None:
            return ["gates: judged on each prompt"]
        digest = sha256_of(self.files()["heads"])[:8]
        return [f"gates: {self.heads if self._table else f'calibration {self.heads}'} (sha256 {digest}...)"]

    def check(self, dims: Dims) -> None:
        if self.heads is None:
            return
        said = f"{self.heads} must hold {dims.layers} rows (layers) of {dims.kv_heads} gates (KV heads)"
        if not self._table:
            said = f"the calibration '{self.heads}' is of a model of another geometry than this one"
        require([len(row) for row in self.gates] == [dims.kv_heads] * dims.layers, f"duo: {said}")

    @cached_property
    def gates(self) -> list[list[float]]:
        """What `heads` names: layers x KV heads."""
        assert self.heads is not None
        if self._table:
            return _read_gates(self.heads)
        learnt = load_calibration(self.name, self.heads)
        return [learnt[layer].flatten().tolist() for layer in sorted(learnt)]

    def new_state(self, rope: Rope) -> DecodeCache:
        return _DuoCache(self)

    def bytes_per_token(self, dims: Dims) -> Bytes:
        heads = self.retrieval_heads(dims.layers * dims.kv_heads)
        return Bytes(2 * heads * dims.head_dim * dims.element_bytes, 0)

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        heads = dims.layers * dims.kv_heads
        kept = self.retrieval_heads(heads)
        token_bytes = 2 * dims.head_dim * dims.element_bytes
        streaming = (heads - kept) * min(tokens, self.sinks + self.recent)
        head_number_bytes = 8
        return {
            "retrieval heads": Bytes(kept * (tokens * token_bytes + head_number_bytes), 0),
            "streaming heads": Bytes(streaming * token_bytes + (heads - kept) * head_number_bytes, 0),
        }

    def retrieval_heads(self, heads: int) -> int:
        """How many of `heads` KV heads, over all layers, keep everything."""
        return round(self.retrieval * heads)

    def attended_tokens(self, dims: Dims, tokens: int, later: int = 0) -> float:
        heads = dims.layers * dims.kv_heads
        share = self.retrieval_heads(heads) / heads
        held = tokens + later
        return share * held + (1 - share) * min(held, self.sinks + self.recent)

    def with_kv_bytes(self, dims: Dims, tokens: int, kv_bytes: int) -> Method:
        heads = dims.layers * dims.kv_heads
        return largest_within(lambda n: replace(self, retrieval=round(n / heads, 4)), 0, heads, dims, tokens, kv_bytes)

    def lossless(self, dims: Dims, tokens: int) -> Method:
        # Half of the heads stream, with room for every token.
        return replace(self, heads=None, recent=max(tokens, 1))


class _DuoCache(LayeredCache):
    def __init__(self, method: Duo) -> None:
        super().__init__()
        self._method = method
        self._prompt: dict[int, LayerKV] = {}

    def ingest(self, layer: int, kv: LayerKV) -> None:
        self._prompt[layer] = kv

    def complete(self) -> None:
        """Choose the best heads of all layers together, in each row of the batch, and let the others' tokens go."""
        layers = list(self._prompt.values())
        if not layers:
            return
        batch, heads = layers[0].k.shape[:2]
        if self._method.heads is None:
            scores = torch.stack([far_peak(kv, self._method.sinks, self._method.recent) for kv in layers], dim=1)
        else:
            scores = torch.tensor(self._method.gates, device=layers[0].k.device).expand(batch, -1, -1)
        count = self._method.retrieval_heads(len(layers) * heads)
        best = ops.top_indices(scores.flatten(1), count)
        retrieval = torch.zeros_like(scores.flatten(1), dtype=torch.bool).scatter_(1, best, True).view_as(scores)
        for index, (layer, kv) in enumerate(self._prompt.items()):
            self.layers[layer] = _DuoLayer(self._method, kv, retrieval[:, index])
        self._prompt.clear()

    def close(self) -> None:
        self._prompt.clear()
        super().close()


class _DuoLayer(LayerState):
    """Heads of one kind share buffers; [B,H] is flattened, so that rows of a batch may differ in their retrieval heads.

    To a buffer of P such heads each one looks like a row of a batch with a single KV head, [P,1,n,D].
    """

    def __init__(self, method: Duo, kv: LayerKV, retrieval: Tensor) -> None:
        flat = retrieval.flatten()
        self._kinds: list[tuple[Tensor, LayerState]] = []
        full, streaming = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]
        if len(full):
            self._kinds.append((full, DenseLayer(_take(kv.k, full), _take(kv.v, full))))
        if len(streaming):
            heads = _StreamingHeads(method, _take(kv.k, streaming), _take(kv.v, streaming))
            self._kinds.append((streaming, heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        by_head = q.reshape(-1, groups, *q.shape[2:])
        out = torch.empty_like(by_head)
        for index, heads in self._kinds:
            out[index] = heads.attend(by_head[index], _take(k, index), _take(v, index), scaling)
        return out.view_as(q)

    def nbytes(self) -> Bytes:
        indices = sum(index.nbytes for index, _ in self._kinds)
        return sum((heads.nbytes() for _, heads in self._kinds), Bytes(indices, 0))


class _StreamingHeads(StepwiseState):
    def __init__(self, method: Duo, k: Tensor, v: Tensor) -> None:
        self._sinks, self._recent = method.sinks, method.recent
        first, last = slice(0, method.sinks), slice(max(method.sinks, k.shape[2] - method.recent), None)
        # Copies, because slices of the whole prompt would keep it alive.
        self._first_k, self._first_v = (TokenBuffer(x[:, :, first].clone(), axis=2) for x in (k, v))
        self._last_k, self._last_v = (TokenBuffer(x[:, :, last].clone(), axis=2) for x in (k, v))

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        for first, last, new in ((self._first_k, self._last_k, k), (self._first_v, self._last_v, v)):
            last.append(new)
            if len(last) > self._recent:
                if len(first) < self._sinks:  # the prompt was shorter than the sinks
                    first.append(last.view[:, :, :1])
                last.drop_front(1)
        return ops.attend(
            q, [(self._first_k.view, self._first_v.view), (self._last_k.view, self._last_v.view)], scaling
        )

    def nbytes(self) -> Bytes:
        buffers = (self._first_k, self._first_v, self._last_k, self._last_v)
        return Bytes(sum(buffer.nbytes() for buffer in buffers), 0)


# Of the tokens that full attention answers with, kept (17 prompts of 3k and 4k tokens: 8 NIAH, 6 RULER, 3 essays
# gone on with; SmolLM2-135M, 2026-11-25) with 50, 25 and 10 % of the heads: 98, 98 and 97 %. By the mean over queries
# 99, 96 and 95 %; by what streaming does to the output 98, 98 and 93 %; by attention of the mean query to the mean key
# 98, 98 and 90 % (that of the last queries, group maximum: 99, 98 and 96 %, and it has to know RoPE); by all attention
# outside, which diffuse heads of low layers have most of, 74, 63 and 64 %; at random 90, 74 and 66 %. In gemma3-270m,
# with two of its three heads, 100 % (8 NIAH); by output 55 %, by all attention outside 89 %.
def far_peak(kv: LayerKV, sinks: int, recent: int) -> Tensor:
    """The most that any of the last queries attends to one token that a streaming head would not keep. [B,H] fp32."""
    batch, heads, tokens, head_dim = kv.k.shape
    observed = kv.q_tail.shape[2]
    grouped = kv.q_tail.reshape(batch, heads, -1, observed, head_dim)
    key = torch.arange(tokens, device=kv.k.device)
    query = torch.arange(tokens - observed, tokens, device=kv.k.device)[:, None]
    far = (key >= sinks) & (query - key >= recent)
    peaks = []
    for head in range(heads):  # one at a time: [B,G,observed,tokens] is large enough
        scores = (grouped[:, head] @ kv.k[:, head, None].mT).float() * kv.scaling
        weights = scores.masked_fill(key > query, float("-inf")).softmax(dim=-1)
        peaks.append((weights * far).flatten(1).amax(dim=1))
    return torch.stack(peaks, dim=1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """The heads `index` of the flattened [B,H]. x [B,H,n,D] -> [P,1,n,D]."""
    return x.flatten(0, 1)[index].unsqueeze(1)


def _read_gates(path: str) -> list[list[float]]:
    try:
        text = read_text(Path(path).expanduser(), f"duo: heads={path}")
    except OSError as error:
        raise SkvError(f"duo: cannot read heads={path}: {error}") from error
    try:
        rows = json.loads(text) if path.endswith(".json") else [line.split() for line in text.splitlines() if line]
        gates = [[float(gate) for gate in row] for row in rows]
    except (ValueError, TypeError) as error:
        raise SkvError(f"duo: heads={path} is not a table of numbers, layers x KV heads") from error
    require(all(math.isfinite(gate) for row in gates for gate in row), f"duo: heads={path} holds numbers not finite")
    return gates
