"""One measurement: bring a batch to its first token, decode, and say what it took. It never takes the sweep down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from evals.bench.conditions import conditions
from evals.bench.engines import Contender
from evals.bench.memory import Room, peak_bytes, release
from evals.bench.records import BenchRecord, Cell
from evals.bench.reuse import MadeHits, hit_rate
from evals.bench.timing import Clock, step_times
from evals.runs.failures import FAILURES, status_of
from shadowkv.common.wording import one_line
from shadowkv.engine.engine import Engine
from shadowkv.planning.planner import demand_of, step_bytes

STEPS_OF_HITS = 8  # not among those timed: counting waits for the device


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

    def measure(self, contender: Contender, cell: Cell) -> BenchRecord:
        """The record of this cell: `oom` or `error` if it cannot be had, with everything released again."""
        device = self.engine.model.device
        release(device)
        before = conditions(device)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self.check_room(contender, cell.context, cell.batch, self.new_tokens)
            return self._measured(contender, cell, started, before)
        except FAILURES as failure:
            status, said = status_of(failure), one_line(failure)
        # Only here has the exception gone, and with its frames the tensors that they held.
        self.engine.forget()
        release(device)
        return BenchRecord(*cell, status, said, self.machine, started, conditions={"before": before})

    def check_room(self, contender: Contender, context: int, batch: int, new_tokens: int) -> None:
        """`Room.check`, after prompts that are kept have made way."""
        contender.leave_host(self.room.host_need(contender.method, context, batch, new_tokens))
        self.room.check(contender.method, context, batch, new_tokens)

    def _measured(self, contender: Contender, cell: Cell, started: str, before: dict[str, object]) -> BenchRecord:
        device, model = self.engine.model.device, self.room.model
        demand = demand_of(contender.method, model.dims, cell.context)
        decoding = contender.start(cell.context, cell.batch)
        try:
            step, made = decoding.step, None
            if self.hits is not None and decoding.chunk_numbers():
                made = MadeHits(self.hits, decoding.resident_chunks, decoding.chunk_numbers)
                step = partial(_one_by_one, made, step)
            step_ms = step_times(decoding.step, self.warmup_steps, self.steps, Clock(device), made)
            held, began, tokens_sha256 = decoding.nbytes(), decoding.began, decoding.tokens_sha256()
            on_device, on_host = peak_bytes(device)
            hits = hit_rate(step, decoding.resident_chunks, STEPS_OF_HITS)
            return BenchRecord(
                *cell,
                status="ok",
                error=None,
                machine=self.machine,
                started=started,
                step_ms=[round(ms, 4) for ms in step_ms],
                warmup_steps=self.warmup_steps,
                ttft_s=began.ttft_s,
                prefill_s=began.prefill_s,
                build_s=began.build_s,
                streamed_rows=began.streamed_rows,
                stacked=began.stacked,
                weights_bytes=model.weight_bytes,
                kv_device_bytes=held.device,
                kv_host_bytes=held.host,
                peak_device_bytes=on_device,
                peak_host_bytes=on_host,
                bus_bytes=cell.batch * demand.bus_bytes,
                read_bytes=step_bytes(demand, model, cell.context, cell.batch),
                hit_rate=hits,
                tokens_sha256=tokens_sha256,
                conditions={"before": before, "after": conditions(device)},
            )
        finally:
            decoding.close()


def _one_by_one(*calls: Callable[[], None]) -> None:
    for call in calls:
        call()
