"""Full attention as vLLM runs it, where it is installed. Written against vLLM's documentation and never run here."""

from __future__ import annotations

import importlib
import importlib.util
import os
from itertools import count
from typing import Any

import torch
from torch import Tensor

from evals.bench.engines import Began, Contender, Decoding
from evals.bench.prompts import Prompts
from evals.bench.timing import Clock
from shadowkv.common.dims import Bytes, Dims
from shadowkv.common.errors import SkvError
from shadowkv.methods.full.method import Full

UNTESTED = (
    "full@vllm: this adapter was never run by its authors; its weights are held beside those of skv, and its KV bytes "
    "are those of the rows, not of the pool that it reserves"
)
_LEAST_CHUNK_TOKENS = 512  # of prompts that one step of vLLM gets through, at the least


def require_vllm() -> None:
    """Raise `SkvError` with what helps where vLLM cannot be imported."""
    if importlib.util.find_spec("vllm") is None:
        raise SkvError("--engine vllm needs vLLM, which is not installed here: pip install vllm, or use --engine hf")


class VllmContender(Contender):
    """One engine step of vLLM is one token of every row, once all prompts are in."""

    label = "full@vllm"
    method = Full()
    stays = False  # its engine steps all rows that it was given

    def __init__(self, folder: str, dtype: str, dims: Dims, prompts: Prompts, device: torch.device) -> None:
        require_vllm()
        self._arguments = {"model": folder, "dtype": dtype, "enable_prefix_caching": False}
        self._dims, self._prompts, self._clock = dims, prompts, Clock(device)
        self._numbers = count()
        self._llm: Any = None

    def start(self, context: int, batch: int) -> Decoding:
        # In a process of its own it would go on by itself, and one call of `step` would not be one step.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        vllm: Any = importlib.import_module("vllm")
        if self._llm is None:
            free, total = torch.cuda.mem_get_info()
            self._llm = vllm.LLM(**self._arguments, gpu_memory_utilization=0.95 * free / total)
        engine = self._llm.llm_engine
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=100_000, ignore_eos=True)
        names = [f"row-{next(self._numbers)}" for _ in range(batch)]
        began = self._clock.now()
        for number, name in enumerate(names):
            ids = self._prompts.ids(context, number)[0].tolist()
            engine.add_request(name, {"prompt_token_ids": ids}, sampling)
        decoding = _VllmDecoding(engine, names, context * self._dims.full_bytes_per_token * batch)
        try:
            decoding.take_in(steps=batch * (context // _LEAST_CHUNK_TOKENS + 2))
        except BaseException:
            decoding.close()
            raise
        seconds = self._clock.now() - began
        decoding.began = Began(seconds, seconds, None, True)
        return decoding


class _VllmDecoding(Decoding):
    def __init__(self, engine: Any, names: list[str], kv_bytes: int) -> None:
        super().__init__(torch.empty(len(names), 0, dtype=torch.long))
        self._engine, self._kv_bytes = engine, kv_bytes
        self._outputs: dict[str, list[int]] = {name: [] for name in names}

    def take_in(self, steps: int) -> None:
        """Run until every row has a token. vLLM lets rows wait that its cache has no room for, instead of failing."""
        for _ in range(steps):
            self._advance()
            if all(self._outputs.values()):
                return
        raise MemoryError("vLLM leaves rows waiting: its cache does not hold them all at once")

    def _advance(self) -> None:
        for output in self._engine.step():
            if output.request_id in self._outputs:  # the others are of a batch that has ended
                self._outputs[output.request_id] = list(output.outputs[0].token_ids)

    def step(self) -> None:
        before = [len(tokens) for tokens in self._outputs.values()]
        self._advance()
        if [len(tokens) - 1 for tokens in self._outputs.values()] != before:
            raise MemoryError("vLLM made rows wait: a step was not one token of each")
        self._tokens.append(torch.tensor([[tokens[-1]] for tokens in self._outputs.values()]))

    def _logits(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError("vLLM samples by itself")

    def nbytes(self) -> Bytes:
        return Bytes(self._kv_bytes, 0)

    def close(self) -> None:
        self._engine.abort_request(list(self._outputs))
