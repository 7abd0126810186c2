"""Counting a step of a batch: what is walked over, and that formulas say what a walk through the steps says."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import geometry_model

from shadowkv.anatomy.rope import Rope
from shadowkv.contract.layerwise import LayerwiseCache
from shadowkv.contract.method import LayerKV
from shadowkv.contract.registry import parse_method
from shadowkv.methods.shadowkv.tails import RowTail, Tails

FAST = ["shadowkv:rank=12,budget=64,outliers=2,window=64,engine=fast", "full:engine=fast", "quest:engine=fast"]


def counted(spec, layers, batch, steps=8):
    """Calls that `make_room` makes, in Python and below it, in some steps of a batch of ragged rows."""
    rope, method, rows = Rope(geometry_model(3, 16)), parse_method(spec), []
    for row in range(batch):
        k, v = torch.randn(2, 1, 2, 90 + row, 16)
        cache = LayerwiseCache(method, rope)
        for layer in range(layers):
            cache.layers[layer] = method.new_layer(2, LayerKV(k, v, torch.randn(1, 6, 64, 16), 0.25), rope)
        rows.append(cache)
    (cache,) = LayerwiseCache.join(rows)
    calls = []
    sys.setprofile(lambda frame, event, what: calls.append(event) if event in ("call", "c_call") else None)
    for _ in range(steps):
        cache.make_room()
    sys.setprofile(None)
    return (len(calls) - 1) / steps


@pytest.mark.parametrize("spec", FAST)
def test_counting_a_step_costs_a_layer_a_few_calls_however_many_rows_there_are(spec):
    of_one = counted(spec, 1, 2)
    assert counted(spec, 1, 24) == of_one
    assert counted(spec, 8, 2) <= 8 * of_one
    assert of_one <= 24


@pytest.mark.parametrize("window", [1, 3, 16])
@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_chunks_go_when_a_walk_through_the_steps_says(chunk, window):
    starts = [RowTail(chunk * 4, 3, 7), RowTail(chunk, 0, 2), RowTail(chunk * 9, 9, 7, fed_tokens=window + 2)]
    tails = Tails(starts, chunk, window)
    held = [[row.tail_tokens + row.fed_tokens - chunk * row.chunks_gone(chunk, window), row] for row in starts]
    gone = [row.chunks_gone(chunk, window) for row in starts]
    for step in range(1, 60):
        due = False
        for number, (tokens, row) in enumerate(held):
            if tokens + 1 >= row.tail_tokens + window + chunk:
                gone[number] += 1
                tokens -= chunk
                due = True
            held[number][0] = tokens + 1
        contexts = [row.context_tokens + chunk * count for row, count in zip(starts, gone, strict=True)]
        landmarks = [row.landmarks + count for row, count in zip(starts, gone, strict=True)]
        tails.append()
        assert tails.due == due
        assert tails.rows == [replace(row, fed_tokens=row.fed_tokens + step) for row in starts]
        assert tails.most_tokens == max(row.tokens for row in starts) + step
        assert tails.landmarks() == landmarks
        assert tails.most_after(0) == (max(contexts), max(landmarks))
        for room in ((max(contexts), max(landmarks)), (12 * chunk, 99), (99 * chunk, 12)):
            exceeded = any(
                context > room[0] or count > room[1] for context, count in zip(contexts, landmarks, strict=True)
            )
            assert tails.outgrew(*room) == exceeded
        if step == 20:
            tails = Tails.stack([tails.pick([0]), tails.pick([1, 2])])
