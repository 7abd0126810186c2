"""ShadowKV as its authors run it, for the planner: another engine than ours, with other buffers and another step.

Read in their repository (bytedance/ShadowKV a21f5a9, `ShadowKVCache_CPU`); what differs in bytes and times from
shadowkv/methods/shadowkv/method.py:
- selected keys and values stay on the device for all layers, so that a chunk selected again is neither rebuilt nor
  fetched. Which share is, depends on the text: about 60 % by their paper, which is what is assumed here;
- 128 tokens of room for generated ones; chunk numbers are int64;
- while values come over the bus, missing keys are rebuilt and resident chunks are moved together: that device work is
  hidden by the fetch, or hides it;
- selection writes its scores, weights and order to memory between kernels.
"""

from __future__ import annotations

from shadowkv.common.dims import Bytes, Dims
from shadowkv.common.errors import SkvError
from shadowkv.methods.shadowkv.method import ShadowKV
from shadowkv.methods.shadowkv.settings import HIT_RATE
from shadowkv.planning.planner import Demand

_NEW_TOKENS = 128
_CHUNK_NUMBER_BYTES = 8
# Scores and weights in bf16, written and read, for every query head; the best of a group and their order per KV head.
_SELECTION_BYTES_PER_Q_HEAD, _SELECTION_BYTES_PER_KV_HEAD = 8, 6


def published_demand(method: ShadowKV, dims: Dims, tokens: int) -> Demand:
    """What their engine asks for with these parameters; raises `SkvError` for those it does not have."""
    if method.values != "native" or method.energy:
        raise SkvError(f"{method.label}: the published engine has neither coded values nor a rank by energy")
    if method.budget >= tokens:
        raise SkvError(
            f"{method.label}: the published engine needs a context longer than the budget, got {tokens} tokens"
        )
    L, H, D, W, e = dims.layers, dims.kv_heads, dims.head_dim, dims.width, dims.element_bytes
    chunks = tokens // method.chunk
    landmarks = max(chunks - method.outlier_chunks, 0)
    exact = (method.outlier_chunks + method.local) * method.chunk + _NEW_TOKENS
    resident = method.budget + exact
    missing = (1 - HIT_RATE) * method.budget
    selection = chunks * (_SELECTION_BYTES_PER_Q_HEAD * dims.q_heads + _SELECTION_BYTES_PER_KV_HEAD * H)
    rebuild = H * missing * method.rank * e + method.rank * W * e + 3 * H * missing * D * e
    moves = 4 * H * HIT_RATE * method.budget * D * e
    attention_flop = 4 * dims.q_heads * D * resident + 2 * dims.q_heads * D * chunks
    return Demand(
        label=method.label,
        parts={
            "factors": Bytes(L * (tokens * method.rank + method.rank * W) * e, 0),
            "landmarks": Bytes(L * landmarks * (W * e + H * _CHUNK_NUMBER_BYTES), 0),
            "resident, outlier and local tokens": Bytes(2 * L * resident * W * e, 0),
            "values": Bytes(0, L * tokens * W * e),
        },
        workspace_bytes=2 * method.budget * W * e,
        read_bytes=round(L * (chunks * W * e + selection + 2 * resident * W * e)),
        bus_bytes=round(L * missing * W * e),
        flop=round(L * (attention_flop + 2 * H * missing * method.rank * D)),
        overlapped_bytes=round(L * (rebuild + moves)),
    )
