"""Gates of DuoAttention, learnt as its authors learn them: by gradient, so that answers survive what gates take away.

Weights are frozen. In each layer the output of every KV head is `gate` of what the model itself attends to there and
`1 - gate` of attention to sinks and recent tokens only. Gates start at 1 and are drawn to 0 by an L1 penalty, against
the squared difference that they make to the last hidden states where a code is to be told.

Known differences from the authors' training: the text is dense in all heads, as it is whenever skv decodes, and only
questions and answers run through gates; texts are short and few, and used several times. What gates mix is theirs:
their forward pass of training gave the same within 1e-6 (mit-han-lab/duo-attention@fe93c31, 2026-11-25).

Two minutes of one core for SmolLM2-135M. Of the 17 prompts that `far_peak` was chosen on (`methods/duo.py`), answers
with its gates keep 99, 98 and 95 % of full attention's tokens with 50, 25 and 10 % of the heads: with many heads more
than the prompt alone tells, with few less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from shadowkv.anatomy.forward import last_hidden
from shadowkv.anatomy.rope import Rope
from shadowkv.common.dims import Bytes, Dims
from shadowkv.contract.method import DecodeCache, LayerKV, Method
from shadowkv.engine.cache import MethodCache
from shadowkv.engine.engine import Engine
from shadowkv.engine.recording import Recording


class Lesson(Protocol):
    """A text, [1,n], what follows it, [1,T], and which of that, [T] bool, must stay as the model tells it."""

    @property
    def text(self) -> Tensor: ...

    @property
    def answers(self) -> Tensor: ...

    @property
    def counted(self) -> Tensor: ...


@dataclass(frozen=True)
class Training:
    """steps: of Adam, one text each · lr: largest step size · penalty: weight of the mean gate in the loss."""

    steps: int = 60
    lr: float = 0.02
    penalty: float = 0.05


class _Taught(NamedTuple):
    recording: Recording
    answers: Tensor
    counted: Tensor  # [T] positions whose hidden states are compared
    own: dict[int, Tensor]  # by layer, what the model attends to: [1,Hq,T,D]
    target: Tensor  # [c,hidden]


def learn_gates(
    engine: Engine, lessons: Sequence[Lesson], sinks: int, recent: int, training: Training
) -> dict[int, Tensor]:
    """Gates of each layer that methods serve, [H] fp32 in [0,1], on the CPU."""
    layers, heads = engine.dims.layer_ids, engine.dims.kv_heads
    gates = torch.ones(len(layers), heads, device=engine.model.device, requires_grad=True)
    with _frozen(engine.model):
        taught = [_watched(engine, lesson) for lesson in lessons]
        optimizer = torch.optim.Adam([gates], lr=training.lr)
        for step in range(training.steps):
            with torch.no_grad():
                gates.clamp_(0, 1)
            one = taught[step % len(taught)]
            mixing = _Mixing(dict(zip(layers, gates, strict=True)), one.own, sinks, recent)
            hidden = _hidden(engine, one.recording, one.answers, mixing)
            loss = (hidden[one.counted] - one.target).square().mean() + training.penalty * gates.abs().mean()
            optimizer.param_groups[0]["lr"] = training.lr * _ramp(step, training.steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return dict(zip(layers, gates.detach().clamp(0, 1).cpu(), strict=True))


def _ramp(step: int, steps: int) -> float:
    """The share of the step size: up in the first fifth, down in the last."""
    fifth = max(steps // 5, 1)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def _watched(engine: Engine, lesson: Lesson) -> _Taught:
    """The text's prefill, and what the model itself makes of the answers."""
    recording = engine.prefill(lesson.text).recording
    engine.forget()
    watching = _Watching()
    with torch.no_grad():
        hidden = _hidden(engine, recording, lesson.answers, watching)
    # The state that tells a token is that of the token before it.
    counted = lesson.counted.roll(-1).nonzero()[:, 0].to(hidden.device)
    return _Taught(recording, lesson.answers, counted, watching.own, hidden[counted])


def _hidden(engine: Engine, recording: Recording, ids: Tensor, cache: DecodeCache) -> Tensor:
    """Last hidden states of [1,T] tokens through `cache`, [T,hidden] fp32."""
    through = MethodCache(engine.model, recording, _Given(cache), engine.rope, shared=True)
    return last_hidden(engine.model, ids.to(engine.model.device), through)[0].float()


class _Watching(DecodeCache):
    """Full attention that remembers what came out."""

    def __init__(self) -> None:
        self._kv: dict[int, LayerKV] = {}
        self.own: dict[int, Tensor] = {}

    def ingest(self, layer: int, kv: LayerKV) -> None:
        self._kv[layer] = kv

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        kv = self._kv.pop(layer)
        k, v = torch.cat((kv.k, k), dim=2), torch.cat((kv.v, v), dim=2)
        near = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        self.own[layer] = _attention(q, k, v, near, scaling)
        return self.own[layer]

    def nbytes(self) -> Bytes:
        raise NotImplementedError


class _Mixing(DecodeCache):
    """Each KV head's share of the model's own output, the rest of attention to sinks and recent tokens."""

    def __init__(self, gates: dict[int, Tensor], own: dict[int, Tensor], sinks: int, recent: int) -> None:
        self._gates, self._own, self._sinks, self._recent = gates, own, sinks, recent
        self._kv: dict[int, tuple[Tensor, Tensor, int]] = {}

    def ingest(self, layer: int, kv: LayerKV) -> None:
        first, last = slice(0, self._sinks), slice(max(self._sinks, kv.k.shape[2] - self._recent), None)
        k, v = (torch.cat((x[:, :, first], x[:, :, last]), dim=2) for x in (kv.k, kv.v))
        self._kv[layer] = k, v, kv.k.shape[2]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        held_k, held_v, prompt = self._kv.pop(layer)
        new, sinks = k.shape[2], min(self._sinks, prompt)
        key = torch.arange(prompt + new, device=q.device)
        key = torch.cat((key[:sinks], key[max(sinks, prompt - self._recent) :]))
        query = torch.arange(prompt, prompt + new, device=q.device)[:, None]
        near = (key <= query) & ((key < self._sinks) | (query - key < self._recent))
        streamed = _attention(q, torch.cat((held_k, k), dim=2), torch.cat((held_v, v), dim=2), near, scaling)
        gate = self._gates[layer].to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1])[:, None, None]
        return gate * self._own[layer] + (1 - gate) * streamed

    def nbytes(self) -> Bytes:
        raise NotImplementedError


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)


@dataclass(frozen=True)
class _Given(Method):
    """What brings a cache that is made already to a prompt."""

    name: ClassVar[str] = "given"
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    cache: DecodeCache = field(compare=False)

    def new_state(self, rope: Rope) -> DecodeCache:
        return self.cache

    def bytes_per_token(self, dims: Dims) -> Bytes:
        raise NotImplementedError


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Gradients pass through the weights and are kept for none of them."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in learning:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in learning:
            weight.requires_grad_(True)
