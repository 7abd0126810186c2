"""What answers a run, in one process."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from evals.runs.task import Task
from shadowkv.engine.engine import Engine
from shadowkv.models.loading import LoadedModel


@dataclass(frozen=True)
class Run:
    """What answers: a model in its engine, and the benchmark that asks.


    With `diagnostics`, prompts of one turn also get each layer of each method compared with full attention. `streamed`
    prompts are computed for each method anew, layer by layer: none of them has to fit as a whole, and none is shared.
    """

    engine: Engine
    loaded: LoadedModel
    task: Task
    diagnostics: bool = False
    streamed: bool = False

    def now(self) -> float:
        """The time after everything queued on the device is done, in seconds."""
        if self.engine.model.device.type == "cuda":
            torch.cuda.synchronize(self.engine.model.device)
        return time.perf_counter()
