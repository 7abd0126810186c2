"""Ratios to full attention in 8 bits: beside those to full attention where both ran, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_folders import answer
from test_bench import MANIFEST, record

from evals.bench.throughput.report import bench_frame, gain_table, throughput_table
from evals.bench.throughput.summary import gains, summarise_bench
from evals.tables.costs import cost_table
from evals.tables.summary import eight_bit_reference, summarise

FP8, INT8 = "full:kv=fp8", "full:kv=int8"


def column(table, head):
    """By method, cells of a column."""
    place, names = (list(table.columns).index(name) for name in (head, "method"))
    return {line[names]: line[place] for line in table.rows}


@pytest.mark.parametrize(
    ("methods", "reference"),
    [
        (["full", "quest"], None),
        (["quest", FP8], None),  # nothing to stand beside
        (["full", INT8], INT8),
        ([INT8, "full", FP8], FP8),
        (["full", f"{FP8}+minference"], None),
    ],
)
def test_the_second_reference_is_the_8_bit_one_of_this_run(methods, reference):
    assert eight_bit_reference(methods) == reference


def sweep():
    """Full attention ends at batch 2, its 8 bits at 4."""
    held = {"full": 4000, FP8: 2000, "few": 1000}
    step_ms = {("full", 1): 10, ("full", 2): 10, (FP8, 2): 8, (FP8, 4): 8, ("few", 1): 20, ("few", 2): 5, ("few", 4): 4}
    return [
        *(record(name, b, n, float(ms), kv_device_bytes=b * held[name]) for (name, b), ms in step_ms.items()
          for n in (0, 1)),
        record("full", 4, 0, 0.0, status="oom", error="no", step_ms=[]),
    ]  # fmt: skip


def test_a_sweep_gives_ratios_to_both():
    rows = summarise_bench(sweep())
    cells = {(row.method, row.batch): row for row in rows}
    few = cells["few", 2]
    assert (few.ratio, few.eight_bit_ratio) == (2.0, 1.6)
    assert (few.kv_ratio, few.eight_bit_kv_ratio) == (0.25, 0.5)
    assert (cells["few", 4].ratio, cells["few", 4].kv_ratio) == (None, None), "full attention did not fit"
    assert (cells["few", 4].eight_bit_ratio, cells["few", 4].eight_bit_kv_ratio) == (2.0, 0.5)
    assert cells["few", 1].eight_bit_ratio is None, "not measured at that batch"
    assert cells["full", 4].kv_ratio is None
    at_two = throughput_table("t", [row for row in rows if row.batch == 2])
    assert column(at_two, "x full") == {"full": "1.00 (1.00–1.00)", FP8: "1.25 (1.25–1.25)", "few": "2.00 (2.00–2.00)"}
    assert column(at_two, f"x {FP8}")["few"] == "1.60 (1.60–1.60)"
    assert column(at_two, "KV\nx full") == {"full": "1.00", FP8: "0.50", "few": "0.25"}
    assert column(at_two, f"KV\nx {FP8}") == {"full": "2.00", FP8: "1.00", "few": "0.50"}
    assert "to full attention in 8 bits" in at_two.caption
    assert bench_frame(MANIFEST, rows, []).eight_bit.tolist() == [FP8] * len(rows)


def test_gains_are_over_the_best_batch_of_each():
    found = {gain.method: gain for gain in gains(sweep())}
    few = found["few"]
    assert (few.gain.median, few.eight_bit_gain.median) == (5.0, 2.0)
    assert found["full"].eight_bit_gain.median == pytest.approx(0.4)
    assert few.flat()["eight_bit_gain"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert column(gain_table(gains(sweep())), f"gain over\n{FP8}")["few"] == "2.00 (2.00–2.00)"


def test_times_of_two_commands_on_two_machines_make_no_ratio_to_it_either():
    elsewhere = [replace(r, machine="elsewhere") if r.method == "few" else r for r in sweep()]
    assert {row.eight_bit_ratio for row in summarise_bench(elsewhere) if row.method == "few"} == {None}


def test_without_it_tables_of_sweeps_are_as_they_were():
    records = [r for r in sweep() if r.method != FP8]
    rows = summarise_bench(records)
    table, best = throughput_table("t", rows), gain_table(gains(records))
    assert [name for name in (*table.columns, *best.columns) if "KV\nx" in name or "kv=" in name] == []
    assert "8 bits" not in table.caption
    assert not [name for name in bench_frame(MANIFEST, rows, []) if "eight_bit" in name or name == "kv_ratio"]


def answers(*methods):
    held = {"full": 4000, FP8: 2000, "few": 0}
    seconds = {"full": 0.2, FP8: 0.1, "few": 0.4}
    return summarise([answer(name, device_bytes=held[name], decode_s=seconds[name]) for name in methods])


def test_an_accuracy_table_gives_ratios_to_both():
    table = cost_table("t", answers("full", FP8, "few"))
    assert column(table, "KV\nx full") == {"full": "1.00", FP8: "0.50", "few": "0.00"}
    assert column(table, f"KV\nx {FP8}") == {"full": "2.00", FP8: "1.00", "few": "0.00"}
    assert column(table, "speed\nx full") == {"full": "1.00", FP8: "2.00", "few": "0.50"}
    assert column(table, f"speed\nx {FP8}") == {"full": "0.50", FP8: "1.00", "few": "0.25"}
    assert "KV x, speed x" in table.caption


@pytest.mark.parametrize("methods", [("full", "few"), (FP8, "few")])
def test_without_both_an_accuracy_table_is_as_it_was(methods):
    table = cost_table("t", answers(*methods))
    assert len(table.columns) == 13
    assert "KV x" not in table.caption
