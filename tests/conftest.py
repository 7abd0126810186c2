from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch

# Before anything imports Triton: whether it interprets is settled then.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny_models import tiny_model
from transformers import PreTrainedModel
from transformers.utils import logging

from shadowkv.models.loading import load_tokenizer
from shadowkv.models.presets import find_preset
from shadowkv.models.resolving import ModelSource


def pytest_configure(config: pytest.Config) -> None:
    """Quiet libraries, and one thread per process that runs tests: several of them with a thread per core each would
    wait for each other."""
    logging.set_verbosity_error()  # as `cli.shared.quiet` has it, which the console script calls
    logging.disable_progress_bar()
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], PreTrainedModel]:
    """Tiny models by family, each built once and never changed."""
    return lru_cache(maxsize=None)(tiny_model)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte tokenizer, saved as a user's local model folder would be."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _plain_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast engine runs in plain torch on a CPU, but for tests of kernels: the interpreter is slow."""
    if not {"interpreter", "kernel_device"} & set(request.fixturenames):
        # Where it is decided, and not for kernels: one imported now would keep the answer.
        monkeypatch.setattr("shadowkv.kernels.operations.interpreted", lambda: False)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests need no network, and a command that would fetch something says so instead."""
    monkeypatch.setenv("SKV_OFFLINE", "1")


@pytest.fixture
def interpreter() -> None:
    """Kernels run in Triton's interpreter, on a CPU."""
    pytest.importorskip("triton", reason="kernels need Triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled on this machine: pytest -m gpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["interpreter", "gpu"])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where kernels run: once in Triton's interpreter and, with `-m gpu`, once compiled for the GPU that is here."""
    if request.param == "cpu":
        request.getfixturevalue("interpreter")
    else:
        pytest.importorskip("triton", reason="kernels need Triton")
    return str(request.param)
