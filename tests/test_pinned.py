"""Pinned host memory: registered once, given back once, and not before the last view has gone."""

from __future__ import annotations

import gc

import pytest
import torch

from shadowkv.tensors import pinned


class Runtime:
    def __init__(self, answer=0):
        self.answer, self.held = answer, {}

    def cudaHostRegister(self, address, size, flags):  # noqa: N802 - CUDA's name
        if not self.answer:
            self.held[address] = size
        return self.answer

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.held[address]
        return 0


def test_memory_is_given_back_with_the_last_view():
    runtime = Runtime()
    x = pinned._empty((3, 5, 7), torch.bfloat16, runtime)
    x.fill_(2.0)
    view = x[1:, 2].transpose(0, 1)
    assert list(runtime.held.values()) == [3 * 5 * 7 * 2]
    del x
    gc.collect()
    assert runtime.held
    assert (view == 2).all()
    del view
    gc.collect()
    assert not runtime.held


def test_what_cannot_be_pinned_is_said_and_still_works():
    runtime = Runtime(answer=2)
    with pytest.warns(UserWarning, match=r"could not be pinned \(CUDA error 2"):
        x = pinned._empty((4, 4), torch.float32, runtime)
    assert x.zero_().sum() == 0
    del x
    gc.collect()


def test_nothing_is_registered_for_nothing():
    assert pinned._empty((4, 0), torch.float32, Runtime(answer=1)).shape == (4, 0)


@pytest.mark.gpu
def test_a_gpu_reads_it():
    x = pinned.empty_pinned((1000, 64), torch.float32)
    x.copy_(torch.arange(64000).view(1000, 64))
    assert x.is_pinned()
    assert torch.equal(x.to("cuda", non_blocking=True).cpu(), x)
