"""The order of work in a decode step of a method that fetches what it chose, played on a simulated clock.

In every layer the dense part comes first, then chunks are chosen, their values cross the bus while keys are rebuilt,
and attention needs both. A batch is divided into pieces, so that one piece's values cross while others choose or
attend; or into two micro-batches half a layer apart, so that the bus has work during the dense part too, for which
weights are read twice. This gives the time of a step, and two floors under it: of bytes alone, and of bytes in the
order in which they depend on each other.

Nothing of it was measured. Bytes are the planner's and rates those of the `GPU`; what kernels take beside their bytes
(`Costs`) is an estimate from reading the code, and so is all that follows from it.
"""

from __future__ import annotations

from typing import NamedTuple

from shadowkv.contract.method import Stages
from shadowkv.models.model_size import ModelSize
from shadowkv.planning.clock import Task, ends_ms
from shadowkv.planning.gpus import Rates

DEVICE, BUS, LAUNCHES = "device", "bus", "launches"


class Work(NamedTuple):
    """What a layer has to do at full speed, ms: weights are read once for all rows, the rest is of each."""

    layers: int
    weights: float
    choose: float
    fetch: float
    rebuild: float
    attend: float
    head: float = 0.0  # once per step, after the last layer
    windows: float = 0.0  # keys and values of layers that the method does not serve

    def dense(self, rows: int) -> float:
        """What comes before the choice."""
        return self.weights + rows * self.windows

    def served(self, rows: int) -> float:
        """What the device does for the method."""
        return rows * (self.choose + self.rebuild + self.attend)


class Costs(NamedTuple):
    """What comes on top of bytes, ms: small kernels, kernels that take their time whatever the batch, launches."""

    dense: float = 0.0  # of a layer's dense part
    choose: float = 0.0  # of a piece
    rebuild: float = 0.0  # of a piece
    attend: float = 0.0  # of a piece
    launches: float = 0.0  # of a layer, by the host; a graph has none
    step: float = 0.0  # of a step, by the host


# In graphs, as this repository's kernels are: 42 small kernels a layer, one program per row and head that chooses and
# one that plans, and joins of attention. Estimates.
ASSUMED = Costs(dense=0.105, choose=0.070, rebuild=0.003, attend=0.010, step=0.4)


class Order(NamedTuple):
    """How a batch is divided."""

    pieces: int = 1  # of a micro-batch
    micro_batches: int = 1


def work_of(stages: Stages, bus_bytes: int, model: ModelSize, tokens: int, rates: Rates) -> Work:
    """The layers of a model, from bytes of one sequence of `tokens` over all of them."""
    layers = len(model.layers)
    head_parameters = model.vocab * model.hidden
    element_bytes = model.dims.element_bytes
    weight_bytes = (model.step_parameters - head_parameters) * element_bytes

    def ms(size: float) -> float:
        return 1000 * size / rates.bandwidth_bytes / layers

    return Work(
        layers=layers,
        weights=ms(weight_bytes),
        choose=ms(stages.choosing),
        fetch=1000 * bus_bytes / rates.link_bytes / layers,
        rebuild=ms(stages.rebuilding),
        attend=ms(stages.attending),
        head=1000 * head_parameters * element_bytes / rates.bandwidth_bytes,
        windows=ms(model.dense_bytes(tokens)),
    )


def step_ms(work: Work, batch: int, order: Order, costs: Costs = ASSUMED) -> float:
    """The simulated time of a step."""
    return costs.step + max(ends_ms(step_tasks(work, batch, order, costs)))


def byte_floor_ms(work: Work, batch: int) -> float:
    """The larger of what memory takes and what the bus takes, as if nothing depended on anything."""
    return max(_memory_ms(work, batch), work.layers * batch * work.fetch)


def chained_floor_ms(work: Work, batch: int, micro_batches: int = 1) -> float:
    """What no division into pieces can go below: nothing overlaps that depends on each other.

    A layer's dense part comes before all of its choices. Behind it the bus waits for one row's choice at least, and one
    row's attention for the last values; or the device is the one that everything waits for.
    """
    micro_batches = max(1, min(batch, micro_batches))
    rows = -(-batch // micro_batches)
    by_bus = work.choose + rows * work.fetch + work.attend
    chain = work.layers * (work.dense(rows) + max(work.served(rows), by_bus)) + work.head
    weights_again = work.layers * (micro_batches - 1) * work.weights
    return max(chain, _memory_ms(work, batch) + weights_again, byte_floor_ms(work, batch))


def _memory_ms(work: Work, batch: int) -> float:
    return work.layers * (work.dense(batch) + work.served(batch)) + work.head


def best_order(work: Work, batch: int, costs: Costs = ASSUMED, most_pieces: int = 8) -> Order:
    """The number of pieces with the shortest simulated step, of equal ones the smallest, in one micro-batch."""
    orders = [Order(pieces) for pieces in range(1, min(batch, most_pieces) + 1)]
    return min(orders, key=lambda order: (round(step_ms(work, batch, order, costs), 9), order.pieces))


def step_tasks(work: Work, batch: int, order: Order, costs: Costs) -> list[Task]:
    """A step in the order in which its streams are given it."""
    queue = _Queue(costs.launches / (1 + 4 * order.pieces))
    parts = [_MicroBatch(queue, work, costs, rows, order.pieces) for rows in _divided(batch, order.micro_batches)]
    for _ in range(work.layers):
        # What a micro-batch waits for comes over the bus while the other one is at work.
        for part in parts:
            part.attend()
            part.choose()
    for part in parts:
        part.attend()
    queue.put(DEVICE, work.head, tuple(number for part in parts for number in part.ready))
    return queue.tasks


class _Queue:
    """Tasks so far, each after its own launch."""

    def __init__(self, launch_ms: float) -> None:
        self.tasks: list[Task] = []
        self._launch_ms = launch_ms

    def put(self, resource: str, ms: float, after: tuple[int, ...]) -> int:
        self.tasks.append(Task(LAUNCHES, self._launch_ms))
        self.tasks.append(Task(resource, ms, (*after, len(self.tasks) - 1)))
        return len(self.tasks) - 1


class _MicroBatch:
    """Rows that go through the layers together."""

    def __init__(self, queue: _Queue, work: Work, costs: Costs, rows: int, pieces: int) -> None:
        self._queue, self._work, self._costs = queue, work, costs
        self._pieces = _divided(rows, pieces)
        self._placed: list[tuple[int, int]] = []  # of each piece: what chose, what fetches
        self.ready: tuple[int, ...] = ()  # what the next layer needs

    def choose(self) -> None:
        """The dense part, and then each piece's choice with its fetch behind it."""
        work, costs, put = self._work, self._costs, self._queue.put
        dense = put(DEVICE, work.dense(sum(self._pieces)) + costs.dense, self.ready)
        for rows in self._pieces:
            chosen = put(DEVICE, rows * work.choose + costs.choose, (dense,))
            self._placed.append((chosen, put(BUS, rows * work.fetch, (chosen,))))

    def attend(self) -> None:
        """Keys and attention of each piece, once its values are there."""
        work, costs, put = self._work, self._costs, self._queue.put
        ends = []
        for rows, (chosen, fetched) in zip(self._pieces, self._placed, strict=False):
            rebuilt = put(DEVICE, rows * work.rebuild + costs.rebuild, (chosen,))
            ends.append(put(DEVICE, rows * work.attend + costs.attend, (rebuilt, fetched)))
        self._placed = []
        self.ready = tuple(ends) or self.ready


def _divided(rows: int, count: int) -> list[int]:
    """Rows of each part, nearly equal; no part is empty."""
    parts = max(1, min(rows, count))
    return [rows * (n + 1) // parts - rows * n // parts for n in range(parts)]
