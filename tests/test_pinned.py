"""Pinned host memory: registered once, given back once, and not before the last view has gone."""

from __future__ import annotations

import gc

import pytest
import torch

from shadowkv.tensors import pinned


class Runtime:
    """CUDA's, whose last error stays until somebody asks for it; torch asks after every launch."""

    def __init__(self, answer=0):
        self.answer, self.held, self.last_error, self.launched = answer, {}, 0, 0

    def cudaHostRegister(self, address, size, flags):  # noqa: N802 - CUDA's name
        if not self.answer:
            self.held[address] = size
        self.last_error = self.answer or self.last_error
        return self.answer

    def launch(self):
        self.launched += 1
        error, self.last_error = self.last_error, 0
        if error:
            raise torch.AcceleratorError("CUDA error: out of memory", error)

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.held[address]
        return 0


def test_memory_is_given_back_with_the_last_view():
    runtime = Runtime()
    x = pinned._empty((3, 5, 7), torch.bfloat16, runtime, runtime.launch)
    x.fill_(2.0)
    view = x[1:, 2].transpose(0, 1)
    assert list(runtime.held.values()) == [3 * 5 * 7 * 2]
    del x
    gc.collect()
    assert runtime.held
    assert not runtime.launched
    assert (view == 2).all()
    del view
    gc.collect()
    assert not runtime.held


def test_what_cannot_be_pinned_is_said_and_still_works():
    runtime = Runtime(answer=2)
    with pytest.warns(UserWarning, match=r"could not be pinned \(CUDA error 2"):
        x = pinned._empty((4, 4), torch.float32, runtime, runtime.launch)
    runtime.launch()  # the next kernel is not taken for the one that failed
    assert x.zero_().sum() == 0
    del x
    gc.collect()


def test_nothing_is_registered_for_nothing():
    runtime = Runtime(answer=1)
    assert pinned._empty((4, 0), torch.float32, runtime, runtime.launch).shape == (4, 0)


def test_launches_that_find_nothing_wrong_are_no_matter():
    """A torch that clears the error by itself."""
    runtime = Runtime(answer=2)
    with pytest.warns(UserWarning, match="could not be pinned"):
        pinned._empty((4, 4), torch.float32, runtime, lambda: None)


@pytest.mark.gpu
def test_a_gpu_goes_on_after_a_refusal():
    """Nothing lies at that address: CUDA refuses to register it, and means it for the next launch too."""
    refused = int(torch.cuda.cudart().cudaHostRegister(4096, 4096, 0))
    assert refused
    pinned._clear_error(pinned._launch)
    assert torch.ones(3, device="cuda").sum() == 3


@pytest.mark.gpu
def test_a_gpu_reads_it():
    x = pinned.empty_pinned((1000, 64), torch.float32)
    x.copy_(torch.arange(64000).view(1000, 64))
    assert x.is_pinned()
    assert torch.equal(x.to("cuda", non_blocking=True).cpu(), x)
