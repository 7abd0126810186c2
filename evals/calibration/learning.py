"""Calibration of methods that learn something about a model from a text, whichever text it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evals.calibration.gate_training import Training, learn_gates
from evals.calibration.passkeys import passkeys
from evals.common.sources import haystack
from shadowkv.anatomy.rope import Rope
from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean
from shadowkv.contract.calibration import Calibration
from shadowkv.contract.method import LayerKV
from shadowkv.engine.engine import Engine
from shadowkv.methods.heads.duo import Duo
from shadowkv.methods.retrieval.infinigen import InfiniGen
from shadowkv.methods.retrieval.loki import Loki

_MIN_TOKENS = 256
# The layers that methods serve of a text's prefill, by number and with all queries -> what a method keeps of them.
Learner = Callable[[Mapping[int, LayerKV], Rope], Calibration]
LEARNERS: Mapping[str, Learner] = MappingProxyType({InfiniGen.name: InfiniGen.calibrate, Loki.name: Loki.calibrate})
# A model, its tokenizer and the tokens of a text, [1,n] -> what a method learns by running the model itself.
ModelLearner = Callable[[PreTrainedModel, Any, Tensor], Calibration]


def find_calibrated(method: str) -> Learner:
    """How a method learns from a prefill; raises `SkvError` where it does not."""
    if method not in LEARNERS:
        known = sorted([*LEARNERS, *_MODEL_LEARNERS])
        raise SkvError(f"'{method}' needs no calibration{did_you_mean(method, known)}; only: {', '.join(known)}")
    return LEARNERS[method]


def find_model_learner(method: str) -> ModelLearner:
    """How a method learns, be it from a prefill alone; raises `SkvError` where it does not."""
    return _MODEL_LEARNERS[method] if method in _MODEL_LEARNERS else partial(_from_prefill, find_calibrated(method))


def calibration_ids(tokenizer: Any, text: str, tokens: int, context_tokens: int) -> tuple[Tensor, dict[str, str]]:
    """The first `tokens` tokens of a text, [1,tokens], and what it is. Raises `SkvError` if it has too few."""
    if tokens < _MIN_TOKENS:
        raise SkvError(f"--tokens must be at least {_MIN_TOKENS}, got {tokens}")
    if tokens > context_tokens:
        raise SkvError(f"--tokens {tokens} is beyond this model's context of {context_tokens}")
    source = haystack(text)
    ids = tokenizer(source.text)["input_ids"]
    if len(ids) < tokens:
        raise SkvError(
            f"calibration text {source.name} is too short: {len(ids)} tokens of {tokens}; "
            f"give a longer --text or fewer --tokens"
        )
    return torch.tensor([ids[:tokens]]), {"text": source.name, "text_sha256": source.sha256, "tokens": str(tokens)}


def calibration_of(learner: Learner, model: PreTrainedModel, ids: Tensor) -> Calibration:
    """What is learnt of the layers that methods serve, on the CPU."""
    engine = Engine(model, record_queries=True)
    recording = engine.prefill(ids).recording
    served = {n: layer.layer_kv(None, 0) for n, layer in enumerate(recording.recorded) if layer.served}
    layers, about = learner(served, engine.rope)
    return Calibration({n: x.cpu() for n, x in layers.items()}, about)


def _from_prefill(learner: Learner, model: PreTrainedModel, tokenizer: Any, ids: Tensor) -> Calibration:
    return calibration_of(learner, model, ids)


def gates_of(
    model: PreTrainedModel, tokenizer: Any, ids: Tensor, texts: int = 6, training: Training | None = None
) -> Calibration:
    """DuoAttention's gates, learnt on `texts` texts as long as the given one, which is what codes are hidden in."""
    method, training = Duo(), training or Training()
    around, tokens = ids[0].tolist(), ids.shape[1]
    lessons = [passkeys(tokenizer, around, tokens, method.sinks, method.recent, seed) for seed in range(texts)]
    gates = learn_gates(Engine(model), lessons, method.sinks, method.recent, training)
    made = {"sinks": method.sinks, "recent": method.recent, "texts": texts, **asdict(training)}
    return Calibration(gates, {key: str(value) for key, value in made.items()})


_MODEL_LEARNERS: Mapping[str, ModelLearner] = MappingProxyType({Duo.name: gates_of})
