"""Gates of DuoAttention by gradient: what they mix, what draws them down and what holds them up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_prompt, tiny_model

from evals.calibration.gate_training import Training, _hidden, _Mixing, _watched, learn_gates
from shadowkv.contract.method import LayerKV
from shadowkv.engine.engine import Engine
from shadowkv.methods.heads.duo import Duo

SINKS, RECENT, PROMPT, NEW = 4, 12, 150, 30


def lesson(seed=1, counted=None):
    counted = torch.arange(NEW) % 3 == 1 if counted is None else counted
    return SimpleNamespace(
        text=random_prompt(PROMPT, seed=seed), answers=random_prompt(NEW, seed=seed + 50), counted=counted
    )


def gates_like(engine, value):
    return {layer: torch.full((engine.dims.kv_heads,), value) for layer in engine.dims.layer_ids}


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "qwen3", "gemma3", "phi3-longrope"])
def test_a_gate_is_a_retrieval_head_at_1_and_a_streaming_head_at_0(family):
    """By the decoding engine's own numbers, with sliding layers as they are."""
    model = tiny_model(family)
    engine = Engine(model)
    prefill = engine.prefill(lesson().text)
    for value in (0.0, 1.0):
        method = Duo(retrieval=value, sinks=SINKS, recent=RECENT)
        expected = engine.extend(engine.replay(prefill, method), lesson().answers)
        with torch.no_grad():
            taught = _watched(Engine(model), lesson())
            mixing = _Mixing(gates_like(engine, value), taught.own, SINKS, RECENT)
            hidden = _hidden(engine, taught.recording, lesson().answers, mixing)
            logits = model.lm_head(hidden[-1:])
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_a_gate_between_mixes_the_models_own_output_with_streaming():
    heads, groups, dim, new = 2, 3, 16, 5
    made = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, heads, 60 + new, dim, generator=made)
    q, own = torch.randn(2, 1, heads * groups, new, dim, generator=made)
    mixing = _Mixing({0: torch.tensor([0.25, 0.6])}, {0: own}, 3, 10)
    mixing.ingest(0, LayerKV(k[:, :, :60], v[:, :, :60], q, 0.3))
    out = mixing.attend(0, q, k[:, :, 60:], v[:, :, 60:], 0.3)
    for t in range(new):
        for head in range(heads * groups):
            kept = [*range(3), *range(60 + t + 1 - 10, 60 + t + 1)]
            weights = (k[0, head // groups, kept] @ q[0, head, t] * 0.3).softmax(-1)
            gate = (0.25, 0.6)[head // groups]
            expected = gate * own[0, head, t] + (1 - gate) * (weights @ v[0, head // groups, kept])
            torch.testing.assert_close(out[0, head, t], expected)


def test_states_that_tell_a_code_are_those_before_its_tokens():
    counted = torch.zeros(NEW, dtype=torch.bool)
    counted[[4, 5, 20]] = True
    assert _watched(Engine(tiny_model("llama")), lesson(counted=counted)).counted.tolist() == [3, 4, 19]


def learnt(**training):
    model = tiny_model("llama").requires_grad_(True)
    gates = learn_gates(Engine(model), [lesson(1), lesson(2)], SINKS, RECENT, Training(**training))
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    return torch.stack([gates[layer] for layer in range(3)])


def test_without_a_penalty_gates_stay_and_with_a_large_one_they_close():
    assert learnt(steps=10, lr=0.05, penalty=0.0).tolist() == [[1.0, 1.0]] * 3
    assert learnt(steps=80, lr=0.05, penalty=1e4).amax().item() < 0.02


def test_heads_whose_loss_tells_most_keep_their_gates():
    model = tiny_model("llama")
    engine = Engine(model)
    taught = [_watched(engine, lesson(seed)) for seed in (1, 2)]
    harm = torch.zeros(3, 2)
    with torch.no_grad():
        for layer, head in [(layer, head) for layer in range(3) for head in range(2)]:
            gates = gates_like(engine, 1.0)
            gates[layer][head] = 0.0
            for one in taught:
                hidden = _hidden(engine, one.recording, one.answers, _Mixing(gates, one.own, SINKS, RECENT))
                harm[layer, head] += (hidden[one.counted] - one.target).square().mean()
    gates = learnt(steps=60, lr=0.05, penalty=float(harm.max()))
    assert gates.flatten().argmax() == harm.flatten().argmax()
    assert (gates > 0.5).tolist() == (harm > harm.max() / 2).tolist() == [[True, True], [False, False], [False, False]]
