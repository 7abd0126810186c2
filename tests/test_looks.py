"""A method is drawn alike in every figure, and no two things in one figure are drawn alike."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from run_folders import answer, measurements

from evals.bench.throughput.plots import write_gain_bars, write_throughput
from evals.bench.throughput.summary import gains, summarise_bench
from evals.tables.curves import curves
from evals.tables.looks import looks
from evals.tables.plots import write_score_by_bytes
from evals.tables.summary import summarise
from shadowkv.contract.registry import methods, parse_method

SETTINGS = ["shadowkv:rank=64", "shadowkv", "shadowkv:rank=32", "quest", "full", "full@hf", "full+minference"]


def test_a_method_is_drawn_alike_whatever_else_is():
    alone = {name: looks([name])[name] for name in methods()}
    assert looks(list(methods())) == alone
    assert looks([*reversed(methods()), "older-than-this"]).items() >= alone.items()
    assert looks(["quest:budget=64"])["quest:budget=64"] == alone["quest"]
    assert looks(["shadowkv (as published)"])["shadowkv (as published)"] == alone["shadowkv"]


def test_nothing_in_one_figure_is_drawn_alike():
    drawn = looks([*methods(), *SETTINGS])
    assert len(drawn) == len(set(drawn.values())) == len({*methods(), *SETTINGS})
    bars = {(look.colour, look.hatch) for look in looks(list(methods())).values()}
    assert len(bars) == len(methods())


def test_settings_of_a_method_are_alike_in_kind():
    drawn = looks(SETTINGS)
    assert drawn["full"].colour == "#000000"
    assert len({drawn[label].marker for label in SETTINGS if label.startswith("shadowkv")}) == 1
    assert len({drawn[label].line for label in SETTINGS if label.startswith("full")}) == 3


@pytest.mark.parametrize("batches", [(1,), (1, 2)])
def test_methods_as_fast_as_each_other_are_all_seen(tmp_path, batches):
    names = {"full": "shadowkv", "quest:budget=64": "quest"}  # black would be an SVG's default and named nowhere
    records = [replace(r, method=names[r.method], step_ms=[10.0]) for r in measurements() if r.batch in batches]
    path = write_throughput(tmp_path / "throughput.png", summarise_bench(records), "t")
    drawn = path.with_suffix(".svg").read_text()
    points = {
        name: set(re.findall(rf'<use [^>]*x="([\d.]+)"[^>]*style="fill: {look.colour.lower()};', drawn))
        for name, look in looks(["shadowkv", "quest"]).items()
    }
    for one, other in (("shadowkv", "quest"), ("quest", "shadowkv")):
        assert len(points[one] - points[other]) == len(batches)


@pytest.mark.parametrize(
    ("labels", "lines"),
    [
        (
            ["full", "quest", "quest:budget=512", "kivi"],
            {"full": ["full"], "quest by budget": ["quest", "quest:budget=512"], "kivi": ["kivi"]},
        ),
        (
            ["infinigen:budget=256", "infinigen:alpha=inf,budget=256", "infinigen:budget=512",
             "infinigen:alpha=inf,budget=512"],
            {
                "infinigen by budget": ["infinigen:budget=256", "infinigen:budget=512"],
                "infinigen:alpha=inf by budget": ["infinigen:alpha=inf,budget=256", "infinigen:alpha=inf,budget=512"],
            },
        ),
        (
            ["shadowkv:budget=256,rank=64", "shadowkv:budget=256,rank=32", "shadowkv:budget=256,outliers=48,rank=64"],
            {
                "shadowkv:budget=256 by rank": ["shadowkv:budget=256,rank=64", "shadowkv:budget=256,rank=32"],
                "shadowkv:budget=256,outliers=48,rank=64": ["shadowkv:budget=256,outliers=48,rank=64"],
            },
        ),
        (
            ["quest:budget=64+minference", "quest:budget=64", "quest+minference"],
            {
                "quest+minference by budget": ["quest:budget=64+minference", "quest+minference"],
                "quest:budget=64": ["quest:budget=64"],
            },
        ),
    ],
)  # fmt: skip
def test_a_line_joins_settings_that_differ_in_one_size(labels, lines):
    assert [parse_method(label).label for label in labels] == labels
    assert curves(labels) == lines


def test_no_setting_is_on_two_lines_nor_on_none():
    labels = [f"shadowkv:budget={budget},rank={rank}" for budget in (64, 128) for rank in (32, 48, 64)]
    labels += ["shadowkv", "shadowkv:rank=32", "shadowkv:budget=64"]
    found = [label for line in curves(labels).values() for label in line]
    assert sorted(found) == sorted(labels)


def test_score_against_bytes_joins_no_settings_of_different_kind(tmp_path):
    labels = [f"infinigen:{alpha}budget={budget}" for alpha in ("", "alpha=inf,") for budget in (256, 512)]
    rows = summarise([answer(label, device_bytes=2**20 + place) for place, label in enumerate(labels)])
    drawn = write_score_by_bytes(tmp_path / "score_by_bytes.png", rows, "t").with_suffix(".svg").read_text()
    assert ">infinigen by budget<" in drawn
    assert ">infinigen:alpha=inf by budget<" in drawn


@pytest.mark.parametrize(("ms_of_full_at_2", "bars"), [(10.0, 1), (100.0, 2)])
def test_a_gain_at_the_batch_of_full_attention_is_drawn_once(tmp_path, ms_of_full_at_2, bars):
    """Quest is fastest at a batch of 2. Where full attention is, too, both of its gains are the same number."""
    records = [
        replace(r, step_ms=[ms_of_full_at_2 if (r.method, r.batch) == ("full", 2) else 9.0] * 2) for r in measurements()
    ]
    (quest,) = [gain for gain in gains(records) if gain.method != "full"]
    assert quest.batch == 2
    drawn = write_gain_bars(tmp_path / "gain.png", gains(records), "t").with_suffix(".svg").read_text()
    assert drawn.count(">quest:budget=64") == bars  # in the legend
    whiskers = re.findall(r'<g id="LineCollection_\d+">', drawn)
    assert len(whiskers) == bars


def test_every_bar_of_a_gain_is_named(tmp_path):
    """Where a method is fastest at full attention's batch in the first context and elsewhere in the second."""
    first = [replace(r, step_ms=[9.0] * 2) for r in measurements()]
    second = [
        replace(r, context=2048, step_ms=[100.0 if (r.method, r.batch) == ("full", 2) else 9.0] * 2) for r in first
    ]
    drawn = write_gain_bars(tmp_path / "gain.png", gains([*first, *second]), "t").with_suffix(".svg").read_text()
    assert ">quest:budget=64, own best batch<" in drawn
    assert ">quest:budget=64, batch of full<" in drawn
