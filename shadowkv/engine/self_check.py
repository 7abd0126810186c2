"""Does a model compute through skv's caches what it computes by itself? Asked before anything is scored.

A short made-up prompt goes through the model's own attention without any cache; then, in chunks and single steps,
through ours. Every decoder layer is given the input it had the first time, so that its difference is its own and not
inherited; then everything once more without that, for what lies between layers. What differs by more than rounding is
refused. A model that passed is not asked again, as long as weights and versions stay the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowkv.anatomy.attention import attach
from shadowkv.anatomy.geometry import find_layers
from shadowkv.common.errors import SkvError
from shadowkv.common.home import skv_home
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full

_LEAST_TOKENS, _MOST_TOKENS = 96, 640
_STEPS = (1, 1, 2)  # tokens fed at once after the prompt: an answer's, and those of a second question
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class SelfCheck:
    """What was compared, and the largest differences in relation to the size of what was expected.

    Errors are None where the model's own numbers are not finite in this type.
    """

    tokens: int
    layer_error: float | None
    logit_error: float | None
    tolerance: float


def self_check(model: PreTrainedModel) -> SelfCheck:
    """Raise `SkvError`, naming the first layer and by how much, if `model` computes something else through our caches.

    Tolerances are 0.01 % in fp32, 2 % in fp16, 10 % in bf16.
    """
    engine = Engine(model, prefill_chunk_tokens=1, reuse_prefix=False, graphs=False)
    windows = [layer.window for layer in engine.layers if layer.window is not None]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _MOST_TOKENS
    prompt = min(max(_LEAST_TOKENS, min(windows, default=0) + 32), _MOST_TOKENS, context - sum(_STEPS))
    engine.prefill_chunk_tokens = prompt * 2 // 5  # three chunks, the last one a short one
    total = prompt + sum(_STEPS)
    ids = _some_ids(model, total)
    tolerance = _TOLERANCE.get(str(model.dtype).removeprefix("torch."), 1e-4)
    own = _Own.of(model, ids)
    if not own.finite:
        return SelfCheck(total, None, None, tolerance)
    ends = [prompt, *(prompt + fed for fed in accumulate(_STEPS))]
    first = engine.prefill_chunk_tokens
    with own.watched(model, [*range(first, prompt, first), *ends]) as watched:
        _run(engine, ids, ends)
    for call, miss in enumerate(watched.misses):
        if not miss <= tolerance:
            raise SkvError(
                f"{type(model).__name__} is not what runs through skv's caches: layer {call} differs from the model's "
                f"own by {miss:.2%} of its output, where {tolerance:.2%} may be rounding; no method can be judged on it"
            )
    logits = _run(engine, ids, ends)
    miss = max(_relative(got, own.logits[:, end - 1]) for got, end in zip(logits, ends, strict=True))
    if not miss <= 3 * tolerance:  # rounding of all layers together
        raise SkvError(
            f"{type(model).__name__} is not what runs through skv's caches: its logits differ from the model's own by "
            f"{miss:.2%}, though no layer does; no method can be judged on it"
        )
    return SelfCheck(total, max(watched.misses, default=None), miss, tolerance)


def remembered(model: PreTrainedModel, weights_sha256: str | None) -> SelfCheck:
    """`self_check`, or what it found of the same weights, type, machine and versions before."""
    path = _file(model, weights_sha256) if weights_sha256 else None
    if path is not None and path.is_file():
        try:
            return SelfCheck(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            pass  # written by another version, or cut off: asked again
    found = self_check(model)
    if path is not None and found.layer_error is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(asdict(found)), encoding="utf-8")
        os.replace(scratch, path)
    return found


class _Own:
    """What a model computes by itself: inputs and outputs of its decoder layers as they ran, and logits."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.logits = torch.empty(0)

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel, ids: Tensor) -> _Own:
        own = cls()

        def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            own.calls.append((_hidden(args, kwargs).clone(), _first(output).clone()))

        with _hooked([layer.register_forward_hook(note, with_kwargs=True) for layer in find_layers(model)]):
            model.set_attn_implementation("eager")
            try:
                own.logits = model(ids, use_cache=False).logits.float()
            finally:
                attach(model)
        return own

    @property
    def finite(self) -> bool:
        return all(bool(x.isfinite().all()) for x in (*(out for _, out in self.calls), self.logits))

    @contextmanager
    def watched(self, model: PreTrainedModel, ends: Sequence[int]) -> Iterator[_Watch]:
        """Within the block every decoder layer is given these inputs, and compared with these outputs.

        ends: of the passes that are made in it, the token after the last one of each.
        """
        watch = _Watch(self.calls, ends)
        hooks = [model.register_forward_pre_hook(watch.begin)]
        for layer in find_layers(model):
            hooks.append(layer.register_forward_pre_hook(watch.give, with_kwargs=True))
            hooks.append(layer.register_forward_hook(watch.compare))
        with _hooked(hooks):
            yield watch


class _Watch:
    """What is done to the decoder layers of one pass after the other."""

    def __init__(self, calls: Sequence[tuple[Tensor, Tensor]], ends: Sequence[int]) -> None:
        self._calls, self._ends = calls, iter(ends)
        self._call, self._end = 0, 0
        self.misses = [0.0] * len(calls)

    def begin(self, *_: object) -> None:
        self._call, self._end = 0, next(self._ends)

    def give(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = self._part(self._calls[self._call][0], _hidden(args, kwargs))
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

    def compare(self, layer: nn.Module, args: Any, output: Any) -> None:
        got = _first(output)
        miss = _relative(got, self._part(self._calls[self._call][1], got))
        self.misses[self._call] = max(self.misses[self._call], miss)
        self._call += 1

    def _part(self, whole: Tensor, like: Tensor) -> Tensor:
        """The tokens of this pass; a model may leave out all but the last ones in its last layers."""
        return whole[..., self._end - like.shape[-2] : self._end, :]


@torch.inference_mode()
def _run(engine: Engine, ids: Tensor, ends: Sequence[int]) -> list[Tensor]:
    """Logits [1,vocab] after the prompt and after every step, through our caches."""
    engine.forget()
    prefill = engine.prefill(ids[:, : ends[0]])
    cache = engine.replay(prefill, Full())
    steps = [engine.extend(cache, ids[:, start:end]) for start, end in pairwise(ends)]
    cache.close()
    return [prefill.logits, *steps]


@contextmanager
def _hooked(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _first(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _relative(got: Tensor, expected: Tensor) -> float:
    """The largest difference of a token's vector, in relation to its length."""
    difference = (got.float() - expected.float()).norm(dim=-1)
    return float((difference / expected.float().norm(dim=-1).clamp_min(1e-12)).max())


def _some_ids(model: PreTrainedModel, tokens: int) -> Tensor:
    """Made-up text, [1,tokens]: always the same, and none of the first ids, which are often special."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(vocabulary // 10, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def _file(model: PreTrainedModel, weights_sha256: str) -> Path:
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    versions = [importlib.metadata.version(package) for package in ("torch", "transformers")]
    asked = [weights_sha256, model.config.to_json_string(), str(model.dtype), name, *versions, _own_version()]
    digest = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    return skv_home() / "self-checks" / f"{digest[:32]}.json"


@cache
def _own_version() -> str:
    """Of this package's source, which changes more often than its number."""
    sources = sorted(Path(__file__).parent.parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
