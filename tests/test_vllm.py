"""The adapter to vLLM against a stand-in with the few calls it makes: what it measures is what it says, or a failure.

vLLM itself is not there: these tests say nothing about whether its calls are still these.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from evals.bench.vllm_engine import VllmContender
from shadowkv.common.dims import Dims

CONTEXT = 600


class StandIn:
    """An engine that holds `room` rows at once, takes a prompt in per step and decodes all it holds in each."""

    def __init__(self, room):
        self.room, self.waiting, self.running, self.told = room, [], {}, []

    def add_request(self, name, prompt, sampling):
        assert len(prompt["prompt_token_ids"]) == CONTEXT
        self.waiting.append(name)

    def abort_request(self, names):
        self.waiting = [name for name in self.waiting if name not in names]
        self.running = {name: tokens for name, tokens in self.running.items() if name not in names}

    def step(self):
        if self.waiting and len(self.running) < self.room:
            self.running[self.waiting.pop(0)] = []
        for number, tokens in enumerate(self.running.values()):
            tokens.append(10 * number + len(tokens))
        return [
            SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=tuple(tokens))])
            for name, tokens in self.running.items()
        ]


@pytest.fixture
def contender(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = SimpleNamespace(name="vllm")
    engine = StandIn(room=3)
    module.LLM = lambda **_: SimpleNamespace(llm_engine=engine)
    module.SamplingParams = lambda **_: None
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1, 1))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    prompts = SimpleNamespace(ids=lambda context, number: torch.full((1, context), number))
    dims = Dims(layers=2, q_heads=2, kv_heads=1, head_dim=8, element_bytes=2)
    return VllmContender("folder", "bfloat16", dims, prompts, torch.device("cpu"))


def test_a_step_is_one_token_of_every_row(contender):
    decoding = contender.start(CONTEXT, 3)
    for _ in range(4):
        decoding.step()
    assert torch.cat(decoding._tokens, dim=1).shape == (3, 4)
    assert decoding.nbytes().device == 3 * CONTEXT * 2 * 2 * 8 * 2
    decoding.close()
    again = contender.start(CONTEXT, 2)
    again.step()
    assert torch.cat(again._tokens, dim=1).shape == (2, 1), "nothing is left of the batch before"


def test_rows_that_wait_are_memory_that_ended(contender):
    with pytest.raises(MemoryError, match="leaves rows waiting"):
        contender.start(CONTEXT, 4)
    assert not contender._llm.llm_engine.running, "and they are let go"


def test_a_row_put_off_while_decoding_is_no_step(contender):
    decoding = contender.start(CONTEXT, 2)
    decoding.step()
    engine = contender._llm.llm_engine
    engine.abort_request([next(iter(engine.running))])
    with pytest.raises(MemoryError, match="not one token of each"):
        decoding.step()
