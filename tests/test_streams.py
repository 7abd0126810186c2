"""Work beside the main stream, with streams that only write down what they are told."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from shadowkv.tensors import streams

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, device=None, priority=0, log=None):
        self.priority, self.capturing, self.log = priority, False, log

    def wait_stream(self, other):
        self.log.append(("wait", self, other))
        self.capturing = self.capturing or other.capturing

    def wait_event(self, event):
        self.log.append(("wait", self, event.recorded_on))


class Event:
    def record(self, stream):
        self.recorded_on = stream


@pytest.fixture
def gpu(monkeypatch):
    """The current stream, of a GPU that is not there, and all that streams were told."""
    log, there = [], [None]

    @contextmanager
    def current(stream):
        before, there[0] = there[0], stream
        yield
        there[0] = before

    there[0] = main = Stream(log=log)
    main.capturing = True
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: Stream(device, priority, log))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: there[0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: there[0].capturing)
    streams._side_stream.cache_clear()
    yield main, log
    streams._side_stream.cache_clear()


def test_a_block_runs_beside_and_is_waited_for(gpu):
    main, log = gpu
    with streams.beside(DEVICE) as wait:
        side = torch.cuda.current_stream()
        assert side is not main
    assert log == [("wait", side, main)]
    wait()
    assert log == [("wait", side, main), ("wait", main, side)]


def test_what_a_step_waits_for_goes_first_and_caches_are_built_as_they_can(gpu):
    """Behind a full GPU a fetch of normal priority waits for all blocks of what was queued before it."""
    with streams.beside(DEVICE):
        building = torch.cuda.current_stream()
    with streams.beside(DEVICE, first=True):
        fetching = torch.cuda.current_stream()
    assert building is not fetching
    assert (building.priority, fetching.priority) == (0, -1)


def test_a_capture_that_is_broken_off_is_joined(gpu):
    """Only with side streams that it has reached: to wait for any other would end it."""
    main, log = gpu
    with streams.beside(DEVICE, first=True):
        side = torch.cuda.current_stream()
    log.clear()
    streams.join_captured()
    assert log == [("wait", main, side)]


def test_nothing_is_beside_a_cpu():
    with streams.beside(torch.device("cpu")) as wait:
        pass
    wait()
