"""Pinned host memory: registered once, given back once, and not before the last view has gone."""

from __future__ import annotations

import errno
import gc
import mmap
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from shadowkv.tensors import pinned
from shadowkv.tensors.pinned import HostRows
from shadowkv.tensors.ragged import RaggedBuffer


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


def mapping_of(address):
    """What Linux says of the memory that begins there: access, kB held, flags."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    heads = [(place, line) for place, line in enumerate(lines) if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line)]
    for (place, line), (end, _) in zip(heads, [*heads[1:], (len(lines), "")], strict=True):
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= address < last:
            said = dict(entry.split(":", 1) for entry in lines[place + 1 : end])
            return line.split()[1], int(said["Rss"].split()[0]), said["VmFlags"].split()
    raise AssertionError(f"nothing at {address:x}")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells")
def test_pages_are_large_private_and_there_before_they_are_registered():
    found = []

    class Asking(Runtime):
        def cudaHostRegister(self, address, size, flags):  # noqa: N802
            found.append(mapping_of(address))
            return super().cudaHostRegister(address, size, flags)

    runtime = Asking()
    x = pinned._empty((96, 2**20), torch.uint8, runtime, runtime.launch)  # more than one piece
    [(access, held_kb, flags)] = found
    assert access.endswith("p"), "shared pages are small ones"
    assert held_kb >= x.nbytes // 1024
    assert {"hg", "dc"} <= set(flags), "large pages, and none for a process that forks"
    assert not x.any()


def test_what_cannot_be_populated_is_touched():
    pages = mmap.mmap(-1, 2**22, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pinned.make_present(torch.frombuffer(pages, dtype=torch.uint8), lambda address, size: errno.EINVAL)
    address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    assert mapping_of(address)[1] >= 2**12


def test_memory_that_is_not_there_is_said():
    with pytest.raises(MemoryError, match="the host has no 0"):
        pinned.make_present(torch.zeros(100, dtype=torch.uint8), lambda address, size: errno.ENOMEM)


def test_every_byte_is_populated_once(monkeypatch):
    monkeypatch.setattr(pinned, "_PIECE_BYTES", 1000)
    flat, asked = torch.zeros(2500, dtype=torch.uint8), []
    pinned.make_present(flat, lambda address, size: asked.append((address - flat.data_ptr(), size)))
    assert sorted(asked) == [(0, 1000), (1000, 1000), (2000, 500)]


def buffer(values, rows, name="v", room=3):
    return RaggedBuffer(values, 2, room, partial(rows.empty, name))


def test_rows_of_a_batch_are_written_where_they_will_be():
    rows, values = HostRows(3), torch.randn(3, 2, 5, 4)
    built = [buffer(values[first:end], rows) for first, end in ((0, 1), (1, 3))]
    places = [held.data.data_ptr() for held in built]
    assert rows.taken
    joined = RaggedBuffer.stack(built)
    assert joined.data.shape == (3, 2, 8, 4)
    assert torch.equal(joined.data[:, :, :5], values)
    assert joined.data.data_ptr() == places[0]
    assert joined.data[1:].data_ptr() == places[1], "nothing was moved"
    joined.data.fill_(1)
    assert joined.reserve(9), "it grows like any other"
    assert (joined.data[:2, :, :8] == 1).all()


def test_rows_that_have_no_place_are_joined_by_copying():
    rows, values = HostRows(2), torch.randn(3, 2, 5, 4)
    equal = [buffer(row[None], rows) for row in values]  # one more than there are places for
    joined = RaggedBuffer.stack(equal)
    assert torch.equal(joined.data[:, :, :5], values)
    assert joined.data.data_ptr() != equal[0].data.data_ptr()
    longer = [buffer(torch.randn(1, 2, tokens, 4), rows, "k") for tokens in (5, 6)]
    assert RaggedBuffer.stack(longer).data.shape == (2, 2, 9, 4)
    turned = [buffer(row[None], HostRows(2)) for row in values[:2]]
    assert torch.equal(RaggedBuffer.stack(turned[::-1]).data[:, :, :5], values[[1, 0]])


def test_rows_in_another_order_are_not_taken_for_the_batch():
    rows, values = HostRows(2), torch.randn(2, 2, 5, 4)
    built = [buffer(row[None], rows) for row in values]
    assert torch.equal(RaggedBuffer.stack(built[::-1]).data[:, :, :5], values[[1, 0]])


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
