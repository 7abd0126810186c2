"""H2O: keep the tokens with the most attention so far ("heavy hitters") and the newest ones, drop the rest.

Paper: https://arxiv.org/abs/2306.14048. There are two ways with the prompt, of which `evict` names one:
- `post_prefill`: scores are column sums of the prompt's full causal attention, then all but the budget is dropped
  at once (theirs where tokens are really dropped, `utils_real_drop`). A second pass over the prompt's queries and keys,
  quadratic like the first;
- `greedy`: tokens are dropped one by one while the prompt goes by (the paper's algorithm; that code, if it is given the
  prompt token by token). A step per prompt token and layer: seconds per 1000 tokens on a CPU.
Both look at all queries of the prompt, which the prefill therefore keeps. Known differences from the authors' code:
- hidden states of the prompt are dense in both ways; dropping token by token, and their masks, also change what later
  layers see;
- their evaluation code masks instead of dropping, by other rules. For OPT and GPT-NeoX scores are attention over all
  tokens, and the newest ones compete for the heavy places too; for LLaMA they are sums over the whole text, later
  queries included. LLaMA's mask while generating (`utils_hh`) lets a token come back, and leaves out for a step the
  one that has just left the window;
- one set per KV head, by the mean over its query heads (their sum would choose the same); theirs is for models
  without groups, and sums the scores of a batch;
- `budget` and `recent` are tokens (in their masks shares of the prompt) and count the newest: the lightest goes right
  before a new one comes, so that no step attends to more. A step of theirs attends to hh_size + recent_size + 1, which
  is `budget`, and `recent` is their recent_size + 1;
- tokens keep their true positions (their streaming variant renumbers them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.layerwise import EvictingMethod, LayerState, StepwiseState
from shadowkv.contract.method import LayerKV, Method
from shadowkv.contract.setting import require
from shadowkv.tensors import ops
from shadowkv.tensors.buffers import TokenBuffer

_EVICTIONS = ("post_prefill", "greedy")


@dataclass(frozen=True)
class H2O(EvictingMethod):
    """budget: tokens held · recent: the newest ones among them (auto: half) · evict: how the prompt is cut down,
    post_prefill (at once) or greedy (token by token)."""

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "drops the token with the least attention so far, outside a window of the newest"
    paper: ClassVar[str] = "2306.14048"
    compared: ClassVar[str | None] = "FMInference/H2O@ac75c2a, 2026-11-25: same tokens in every step, both ways"

    recent: int | None = None
    evict: str = "post_prefill"

    def __post_init__(self) -> None:
        require(self.budget >= 1, f"h2o: budget must be at least 1, got {self.budget}")
        require(
            self.recent is None or 1 <= self.recent <= self.budget,
            f"h2o: recent={self.recent} must be 1 to budget={self.budget}, which includes it",
        )
        require(self.evict in _EVICTIONS, f"h2o: evict={self.evict} is unknown; one of {', '.join(_EVICTIONS)}")

    @property
    def needs_prompt_queries(self) -> bool:
        return True

    @property
    def recent_tokens(self) -> int:
        """Newest tokens that are never dropped."""
        return (self.budget + 1) // 2 if self.recent is None else self.recent

    def new_layer(self, layer: int, kv: LayerKV, rope: Rope) -> LayerState:
        if self.evict == "post_prefill":
            return _H2OLayer(self, kv)
        # Nothing is dropped before the cache is full; from there on the prompt goes by as new tokens would.
        assert kv.q_all is not None
        first = slice(0, self.budget)
        start = kv._replace(k=kv.k[:, :, first], v=kv.v[:, :, first], q_all=kv.q_all[:, :, first])
        state = _H2OLayer(self, start)
        for t in range(self.budget, kv.k.shape[2]):
            now = slice(t, t + 1)
            state.step(kv.q_all[:, :, now], kv.k[:, :, now], kv.v[:, :, now], kv.scaling)
        return state

    def memory_parts(self, dims: Dims, tokens: int) -> dict[str, Bytes]:
        held = min(tokens, self.budget)
        return {
            "keys and values": Bytes(held * dims.full_bytes_per_token, 0),
            "scores and positions": Bytes(held * dims.layers * dims.kv_heads * (4 + 4), 0),
        }

    @property
    def least_budget(self) -> int:
        return self.recent or 1

    def lossless(self, dims: Dims, tokens: int) -> Method:
        return replace(self, budget=tokens, recent=None)


class _H2OLayer(StepwiseState):
    """Tokens in no order: keys, values, score (attention received so far) and position of each. [B,H,n]"""

    def __init__(self, method: H2O, kv: LayerKV) -> None:
        assert kv.q_all is not None
        self._budget, self._recent = method.budget, method.recent_tokens
        batch, heads, self._tokens, _ = kv.k.shape
        k, v = kv.k, kv.v
        self._score = ops.received_attention(kv.q_all, k, kv.scaling).mean(dim=2)
        self._position = torch.arange(self._tokens, dtype=torch.int32, device=k.device).repeat(batch, heads, 1)
        if self._tokens > self._budget:
            older = self._tokens - self._recent
            heavy = ops.top_indices(self._score[..., :older], self._budget - self._recent)
            kept = torch.cat((heavy, self._position[..., older:].long()), dim=2)
            self._score, self._position = self._score.gather(2, kept), self._position.gather(2, kept)
            k, v = ops.gather_tokens(k, kept), ops.gather_tokens(v, kept)
        self._k, self._v = TokenBuffer(k, axis=2), TokenBuffer(v, axis=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        if len(self._k) < self._budget:
            self._k.append(k)
            self._v.append(v)
            self._score = F.pad(self._score, (0, 1), value=0.0)
            self._position = F.pad(self._position, (0, 1), value=self._tokens)
        else:
            recent = self._position > self._tokens - self._recent
            place = ops.weakest(self._score.masked_fill(recent, float("inf")))
            self._k.put(place, k)
            self._v.put(place, v)
            self._score = self._score.scatter(2, place, 0.0)
            self._position = self._position.scatter(2, place, self._tokens)
        self._tokens += 1
        weights = ops.attention_weights(q, self._k.view, scaling)
        self._score += weights.mean(dim=2)
        return ops.weighted_values(weights, self._v.view)

    def nbytes(self) -> Bytes:
        bookkeeping = self._score.nbytes + self._position.nbytes
        return Bytes(self._k.nbytes() + self._v.nbytes() + bookkeeping, 0)
