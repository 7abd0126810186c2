"""What only DuoAttention promises."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import random_prompt, tiny_model

from shadowkv.common.dims import Dims
from shadowkv.common.errors import SkvError
from shadowkv.contract.layerwise import DenseLayer
from shadowkv.contract.method import LayerKV
from shadowkv.engine.engine import Engine
from shadowkv.methods.heads.duo import Duo, far_peak

HEADS, DIM, PROMPT, LAYERS = 2, 16, 90, 3


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt_of(layer, groups, batch=1):
    k, v = rand(batch, HEADS, PROMPT, DIM, seed=layer), rand(batch, HEADS, PROMPT, DIM, seed=layer + 10)
    return LayerKV(k, v, 2 * rand(batch, HEADS * groups, 20, DIM, seed=layer + 20), 0.4)


def built(method, layers):
    cache = method.new_state(rope=None)
    for layer, kv in enumerate(layers):
        cache.ingest(layer, kv)
    cache.complete()
    return cache


def naive_peak(kv, head, row, sinks, recent):
    """One query at a time."""
    groups, best = kv.q_tail.shape[1] // HEADS, 0.0
    for group in range(groups):
        for t in range(20):
            position = PROMPT - 20 + t
            weights = (kv.k[row, head, : position + 1] @ kv.q_tail[row, head * groups + group, t] * 0.4).softmax(-1)
            best = max(best, weights[sinks : max(position + 1 - recent, sinks)].max().item())
    return best


@pytest.mark.parametrize("groups", [1, 3, 4])
def test_heads_are_chosen_by_the_one_token_that_streaming_would_lose(groups):
    layers = [prompt_of(layer, groups, batch=2) for layer in range(LAYERS)]
    naive = torch.tensor(
        [[[naive_peak(kv, head, row, 3, 30) for head in range(HEADS)] for kv in layers] for row in range(2)]
    )
    torch.testing.assert_close(torch.stack([far_peak(kv, 3, 30) for kv in layers], dim=1), naive)
    cache = built(Duo(sinks=3, recent=30, retrieval=0.34), layers)
    for row in range(2):
        expected = {divmod(i, HEADS) for i in naive[row].flatten().topk(2).indices.tolist()}
        got = set()
        for layer, state in cache.layers.items():
            flat = [i for index, heads in state._kinds if isinstance(heads, DenseLayer) for i in index]
            got |= {(layer, int(i) % HEADS) for i in flat if int(i) // HEADS == row}
        assert got == expected


@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_retrieval_heads_see_all_and_streaming_heads_their_ends(groups, head_dim, tmp_path):
    gates = tmp_path / "gates.tsv"
    gates.write_text("0.1\t0.9\n")
    steps = 12
    k, v = rand(1, 2, PROMPT + steps, head_dim, seed=1), rand(1, 2, PROMPT + steps, head_dim, seed=2)
    q = rand(1, 2 * groups, steps, head_dim, seed=3)
    kv = LayerKV(k[:, :, :PROMPT], v[:, :, :PROMPT], q[:, :, :0], 0.2)
    cache = built(Duo(heads=str(gates), sinks=4, recent=9), [kv])
    out = cache.attend(0, q, k[:, :, PROMPT:], v[:, :, PROMPT:], 0.2)
    for t in range(steps):
        tokens = PROMPT + t + 1
        rows = {0: [*range(4), *range(tokens - 9, tokens)], 1: list(range(tokens))}
        for head in range(2 * groups):
            kept = rows[head // groups]
            weights = (k[0, head // groups, kept] @ q[0, head, t] * 0.2).softmax(-1)
            torch.testing.assert_close(out[0, head, t], weights @ v[0, head // groups, kept])


def test_streaming_heads_let_their_tokens_go():
    held = {}
    for share in (0.0, 0.5, 1.0):
        held[share] = built(Duo(sinks=4, recent=10, retrieval=share), [prompt_of(i, 1) for i in range(4)]).nbytes()
    index = 8 * 8
    assert held[1.0].device == 8 * 2 * PROMPT * DIM * 4 + index
    assert held[0.5].device == 4 * 2 * (PROMPT + 14) * DIM * 4 + index
    assert held[0.0].device == 8 * 2 * 14 * DIM * 4 + index


def test_a_prompt_shorter_than_the_sinks_fills_them_first():
    method = Duo(sinks=6, recent=4, retrieval=0.0)
    k, v = rand(1, 1, 30, DIM, seed=1), rand(1, 1, 30, DIM, seed=2)
    q = rand(1, 1, 30, DIM, seed=3)
    cache = built(method, [LayerKV(k[:, :, :3], v[:, :, :3], q[:, :, :3], 0.4)])
    out = cache.attend(0, q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], 0.4)
    for t in range(27):
        kept = sorted({*range(min(6, t + 4)), *range(max(t, 0), t + 4)})
        weights = (k[0, 0, kept] @ q[0, 0, t + 3] * 0.4).softmax(-1)
        torch.testing.assert_close(out[0, 0, t], weights @ v[0, 0, kept])


@pytest.mark.parametrize("suffix", ["json", "tsv"])
def test_a_table_of_gates_decides_on_a_model(tmp_path, suffix):
    engine = Engine(tiny_model("llama"), prefill_chunk_tokens=128)
    table = [[0.0, 1.0], [0.5, 0.2], [0.9, 0.4]]
    path = tmp_path / f"gates.{suffix}"
    text = json.dumps(table) if suffix == "json" else "\n".join("\t".join(map(str, row)) for row in table)
    path.write_text(text)
    method = Duo(heads=str(path), sinks=2, recent=8)
    cache = engine.replay(engine.prefill(random_prompt(300)), method)
    assert cache.nbytes().device == (3 * 300 + 3 * 10) * 2 * 16 * 4 + 6 * 8


@pytest.mark.parametrize(
    ("text", "says"),
    [("1 2\n", "must hold 3 rows"), ("1\n1\n1\n", "2 gates"), ("a b\n", "not a table"), ("nan 1\n", "not finite")],
)
def test_bad_tables_are_one_clear_line(tmp_path, text, says):
    path = tmp_path / "gates.tsv"
    path.write_text(text)
    dims = Dims(layers=3, q_heads=4, kv_heads=2, head_dim=16, element_bytes=2)
    with pytest.raises(SkvError, match=says):
        Duo(heads=str(path)).check(dims)
    with pytest.raises(SkvError, match="cannot read"):
        Duo(heads=str(tmp_path / "none.tsv")).check(dims)
