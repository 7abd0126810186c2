"""One measurement: bring a batch to its first token, decode, and say what it took. It never takes the sweep down.

A batch is built once and decodes on from repeat to repeat, as long as that changes next to nothing of what is measured:
see `Bench.steps_of_a_build`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from evals.bench.conditions import conditions
from evals.bench.engines import Contender, Decoding
from evals.bench.memory import Room, peak_bytes, release
from evals.bench.records import BenchRecord, Cell
from evals.bench.reuse import MadeHits, hit_rate
from evals.bench.timing import Clock, step_times
from evals.runs.failures import FAILURES, status_of
from shadowkv.common.dims import Bytes
from shadowkv.common.errors import SkvError
from shadowkv.common.wording import one_line
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.preallocated import ROOM_TOKENS
from shadowkv.planning.planner import demand_of, step_bytes

STEPS_OF_HITS = 8  # not among those timed: counting waits for the device
GROWTH_SHARE = 0.01  # of the context, that rows may have grown by when the last repeat of a build ends


@dataclass
class _Built:
    """A batch that stays, and what is known of it once."""

    decoding: Decoding
    made: MadeHits | None
    decoded: int = 0  # tokens of each row
    hits: float | None = None
    peaks: tuple[int | None, int | None] = (None, None)  # on the device, of the process; without what stood beside


@dataclass
class Batches:
    """What is built of one context and batch size, by method: let go by `close`."""

    turns: Sequence[str] | None = None  # methods that take turns; None for all that are measured
    built: dict[str, _Built] = field(default_factory=dict)

    def let_go(self, label: str) -> None:
        built = self.built.pop(label, None)
        if built is not None:
            built.decoding.close()

    def close(self) -> None:
        for label in list(self.built):
            self.let_go(label)

    def beside(self, label: str) -> Bytes:
        """What the others hold."""
        return sum((b.decoding.nbytes() for name, b in self.built.items() if name != label), Bytes(0, 0))


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure."""

    engine: Engine
    room: Room
    machine: str
    warmup_steps: int
    steps: int
    hits: float | None = None  # share of the chunks chosen that are made to be there: see `MadeHits`

    @property
    def new_tokens(self) -> int:
        return self.warmup_steps + self.steps

    def steps_of_a_build(self, context: int) -> int:
        """Tokens that rows may decode after they are built: within 1 % of their context and the room that caches make.

        Where that is less than a repeat takes, each is built anew.
        """
        return min(int(GROWTH_SHARE * context), ROOM_TOKENS)

    def repeats_of_a_build(self, context: int) -> int:
        """How many repeats a batch is built once for."""
        return 1 + max(0, (self.steps_of_a_build(context) - self.new_tokens - STEPS_OF_HITS) // self.new_tokens)

    @contextmanager
    def batches(self, turns: Sequence[str] | None = None) -> Iterator[Batches]:
        """Batches that stay until the block ends. turns: methods that take turns, where others are measured apart."""
        batches = Batches(turns)
        try:
            yield batches
        finally:
            batches.close()

    def measure(self, contender: Contender, cell: Cell, batches: Batches | None = None) -> BenchRecord:
        """The record of this cell: `oom` or `error` if it cannot be had, with everything released again.

        batches: what is built already, and where what is built now stays for the next repeat.
        """
        if batches is None:
            with self.batches() as batches:
                return self.measure(contender, cell, batches)
        device = self.engine.model.device
        release(device)
        before = conditions(device)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            record = self._measured(contender, cell, started, before, batches)
        except FAILURES as failure:
            status, said = status_of(failure), one_line(failure)
        else:
            if not self._may_go_on(cell.context, batches.built[cell.method].decoded + self.new_tokens):
                batches.let_go(cell.method)
            return record
        # Only here has the exception gone, and with its frames the tensors that they held.
        batches.let_go(cell.method)
        crowded = status == "oom" and bool(batches.built)
        if crowded:
            batches.close()
        self.engine.forget()
        release(device)
        if crowded:  # alone it may fit
            return self.measure(contender, cell, batches)
        return BenchRecord(*cell, status, said, self.machine, started, conditions={"before": before})

    def check_room(self, contender: Contender, context: int, batch: int, new_tokens: int) -> None:
        """`Room.check`, after prompts that are kept have made way."""
        contender.leave_host(self.room.host_need(contender.method, context, batch, new_tokens))
        self.room.check(contender.method, context, batch, new_tokens)

    def _built(self, contender: Contender, cell: Cell, batches: Batches) -> _Built:
        """The batch: the one there is, if it may decode on, or a new one."""
        there = batches.built.get(cell.method)
        if there is not None and self._may_go_on(cell.context, there.decoded + self.new_tokens):
            return there
        del there  # or it would be held while the new one is built
        batches.let_go(cell.method)
        release(self.engine.model.device)
        self.check_room(contender, cell.context, cell.batch, self.new_tokens)
        decoding = contender.start(cell.context, cell.batch)
        batches.built[cell.method] = built = _Built(decoding, None)
        if self.hits is not None and decoding.chunk_numbers():
            built.made = MadeHits(self.hits, decoding.resident_chunks, decoding.chunk_numbers)
        return built

    def _may_go_on(self, context: int, tokens: int) -> bool:
        if tokens > self.steps_of_a_build(context):
            return False
        try:
            self.engine.rope.check_span(context, tokens)
        except SkvError:
            return False  # the model's frequencies would change under the keys
        return True

    def _measured(
        self, contender: Contender, cell: Cell, started: str, before: dict[str, object], batches: Batches
    ) -> BenchRecord:
        device, model = self.engine.model.device, self.room.model
        demand = demand_of(contender.method, model.dims, cell.context)
        built = self._built(contender, cell, batches)
        decoding, decoded_before = built.decoding, built.decoded
        with decoding.awake():
            step_ms = step_times(decoding.step, self.warmup_steps, self.steps, Clock(device), built.made)
            built.decoded += self.new_tokens
            held, began, tokens_sha256 = decoding.nbytes(), decoding.began, decoding.tokens_sha256()
            built.peaks = _higher(built.peaks, self._own_peaks(batches.beside(cell.method)))
            if not decoded_before:
                step = decoding.step if built.made is None else partial(_one_by_one, built.made, decoding.step)
                built.hits = hit_rate(step, decoding.resident_chunks, STEPS_OF_HITS)
                built.decoded += STEPS_OF_HITS if decoding.resident_chunks() else 0
        return BenchRecord(
            *cell,
            status="ok",
            error=None,
            machine=self.machine,
            started=started,
            step_ms=[round(ms, 4) for ms in step_ms],
            warmup_steps=self.warmup_steps,
            decoded_before=decoded_before,
            turns=None if batches.turns is None else list(batches.turns),
            ttft_s=began.ttft_s,
            prefill_s=began.prefill_s,
            build_s=began.build_s,
            streamed_rows=began.streamed_rows,
            stacked=began.stacked,
            weights_bytes=model.weight_bytes,
            kv_device_bytes=held.device,
            kv_host_bytes=held.host,
            peak_device_bytes=built.peaks[0],
            peak_host_bytes=built.peaks[1],
            bus_bytes=cell.batch * demand.bus_bytes,
            read_bytes=step_bytes(demand, model, cell.context, cell.batch),
            hit_rate=built.hits,
            tokens_sha256=tokens_sha256,
            conditions={"before": before, "after": conditions(device)},
        )

    def _own_peaks(self, beside: Bytes) -> tuple[int | None, int | None]:
        on_device, on_host = peak_bytes(self.engine.model.device)
        on_gpu = self.engine.model.device.type == "cuda"
        others_on_host = beside.host if on_gpu else sum(beside)
        return (
            None if on_device is None else on_device - beside.device,
            None if on_host is None else on_host - others_on_host,
        )


def _higher(one: tuple[int | None, int | None], other: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    first, second = (max((x for x in pair if x is not None), default=None) for pair in zip(one, other, strict=True))
    return first, second


def _one_by_one(*calls: Callable[[], None]) -> None:
    for call in calls:
        call()
