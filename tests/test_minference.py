"""The sparse prefill: what each head reads, and that dense methods never notice it."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import FAMILIES, random_prompt, through, tiny_model

from shadowkv.common.dims import Dims
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import methods, parse_method
from shadowkv.contract.with_prefill import WithPrefill
from shadowkv.engine.drop_in import new_cache
from shadowkv.engine.engine import Engine
from shadowkv.methods.full.method import Full
from shadowkv.methods.prefill.minference import MInference


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_mask(method, q, k, scaling):
    """Which of n keys each of the last T queries of one head reads, token by token. [T,n]."""
    tokens, begin = len(k), len(k) - len(q)
    mask = torch.zeros(len(q), tokens, dtype=torch.bool)
    tail = range(max(tokens - 64, begin), tokens)
    columns, diagonals = torch.zeros(tokens), torch.zeros(tokens)
    for i in tail:
        weights = (k[: i + 1] @ q[i - begin] * scaling).softmax(-1)
        columns[: i + 1] += weights
        diagonals[: i + 1] += weights.flip(0)
    columns[:30], diagonals[:100] = float("inf"), float("inf")
    best_columns = set(columns.sort(descending=True, stable=True).indices[: max(method.vertical, 30)].tolist())
    best_diagonals = set(diagonals.sort(descending=True, stable=True).indices[: max(method.slash, 50)].tolist())
    for start in range(begin, tokens, 64):
        rows = range(start, min(start + 64, tokens))
        if method.pattern == "block_sparse":
            mean = q[start - begin : rows[-1] + 1 - begin].mean(0)
            scores = [k[b : b + 64].mean(0) @ mean for b in range(0, start // 64 * 64, 64)]
            own = rows[-1] // 64 - start // 64 + 1
            count = min(max(method.blocks - own, 0), len(scores))
            blocks = set(torch.tensor(scores).topk(count).indices.tolist()) if count else set()
            read = {j for j in range(tokens) if j // 64 in blocks or j // 64 >= start // 64}
        else:
            read = best_columns | {i - o for i in rows for o in best_diagonals}
        for i in rows:
            if method.pattern == "a_shape":
                read = {*range(method.sinks), *range(i - method.local + 1, i + 1)}
            for j in read:
                if 0 <= j <= i:
                    mask[i - begin, j] = True
    return mask


CASES = [
    MInference(vertical=40, slash=110),
    MInference(vertical=3, slash=2),
    MInference(pattern="a_shape", sinks=5, local=40),
    MInference(pattern="block_sparse", blocks=3),
]


@pytest.mark.parametrize("method", CASES, ids=lambda m: m.label)
@pytest.mark.parametrize(("groups", "dim"), [(1, 64), (3, 96), (4, 128), (1, 256)])
@pytest.mark.parametrize(("tokens", "chunk"), [(400, 400), (400, 150), (333, 1), (64, 64)])
def test_a_chunk_is_dense_attention_under_the_mask_of_the_definition(method, groups, dim, tokens, chunk):
    q, k, v = rand(1, groups, chunk, dim, seed=1), rand(1, 1, tokens, dim, seed=2), rand(1, 1, tokens, dim, seed=3)
    out = method.attention(0, q, k, v, 0.3)
    dense = 0
    for head in range(groups):
        mask = naive_mask(method, q[0, head], k[0, 0], 0.3)
        assert mask.diagonal(tokens - chunk).all(), "every query reads its own token"
        scores = (q[0, head] @ k[0, 0].T * 0.3).masked_fill(~mask, float("-inf"))
        torch.testing.assert_close(out[0, head], scores.softmax(-1) @ v[0, 0], rtol=1e-4, atol=1e-5)
        dense += mask.sum().item() / len(mask) / tokens
    assert dense / groups < 0.95 or tokens < 100


def test_what_is_read_depends_on_no_value():
    q, k = rand(1, 2, 300, 16, seed=1), rand(1, 2, 300, 16, seed=2)
    outs = [
        MInference(vertical=40, slash=110).attention(0, q, k, v, 0.3)
        for v in (rand(1, 2, 300, 16), 2 * rand(1, 2, 300, 16))
    ]
    torch.testing.assert_close(2 * outs[0], outs[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_columns_are_a_dense_prefill(tiny, family):
    engine, ids = Engine(tiny(family), prefill_chunk_tokens=128), random_prompt(300)
    method = WithPrefill(Full(), MInference(vertical=5, slash=5)).lossless(engine.dims, 300)
    sparse = engine.prefill(ids, method.prefill)
    dense = engine.prefill(ids)
    assert ((sparse.logits - dense.logits).norm() / dense.logits.norm()).item() < 1e-4


@pytest.mark.parametrize("inner", methods())
def test_it_combines_with_every_method_and_dense_ones_keep_their_snapshot(inner):
    model, ids = tiny_model("llama", head_dim=64), random_prompt(300)
    engine = Engine(model, prefill_chunk_tokens=128, record_queries=True)
    method = methods()[inner]().lossless(engine.dims, 400) or methods()[inner]()
    both = WithPrefill(method, MInference(vertical=1, slash=1))
    dense = engine.prefill(ids)
    alone = engine.decode(engine.replay(dense, Full()), dense.logits, 8)
    sparse = engine.prefill(ids, both.prefill)
    answer = engine.decode(engine.replay(sparse, both), sparse.logits, 8)
    assert not torch.allclose(sparse.logits, dense.logits)
    assert engine.decode(engine.replay(dense, Full()), dense.logits, 8) == alone
    assert engine.generate(ids, both, 8) == answer
    with pytest.raises(ValueError, match="another prefill"):
        engine.replay(dense, both)


def test_prefix_reuse_changes_nothing_to_the_bit():
    model, sparse, shared = tiny_model("llama"), MInference(vertical=20, slash=30), random_prompt(250)
    reusing, fresh = Engine(model, prefill_chunk_tokens=64), Engine(model, prefill_chunk_tokens=64, reuse_prefix=False)
    for tokens in (250, 200, 130):
        ids = torch.cat((shared[:, :tokens], random_prompt(400 - tokens, seed=tokens)), dim=1)
        left, right = reusing.prefill(ids, sparse), fresh.prefill(ids, sparse)
        assert torch.equal(left.logits, right.logits)
    assert left.reused_tokens == 128


def test_generate_gives_the_tokens_of_the_engine_and_refuses_padding():
    model, ids = tiny_model("llama"), random_prompt(300)
    method = parse_method("quest:budget=64+minference:vertical=20,slash=30")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mine = Engine(model, prefill_chunk_tokens=300).generate(ids, method, 12)[0]
    got = model.generate(
        ids, attention_mask=torch.ones_like(ids), **through(model, new_cache(method, model)), **options
    )
    assert got[0, 300:].tolist() == mine
    mask = torch.ones_like(ids).index_fill_(1, torch.arange(9), 0)
    with pytest.raises(SkvError, match="leave out the padding"):
        model.generate(ids, attention_mask=mask, **through(model, new_cache(method, model)), **options)


def test_a_table_in_the_authors_format_gives_each_head_its_pattern(tmp_path):
    path = tmp_path / "pattern.json"
    one = {"0": ["vertical_and_slash", 40, 110, 0.9], "1": ["stream_llm", 5, 40, 0.8], "2": ["block_sparse", 3, 0, 1]}
    path.write_text(json.dumps([one]))
    q, k, v = rand(1, 3, 300, 16, seed=1), rand(1, 1, 300, 16, seed=2), rand(1, 1, 300, 16, seed=3)
    got = MInference(heads=str(path)).attention(0, q, k, v, 0.3)
    alone = [CASES[i].attention(0, q, k, v, 0.3)[:, head] for head, i in enumerate((0, 2, 3))]
    assert torch.equal(got, torch.stack(alone, dim=1))
    dims = Dims(layers=1, q_heads=4, kv_heads=2, head_dim=16, element_bytes=2)
    with pytest.raises(SkvError, match="no pattern for layer 0 head 3"):
        MInference(heads=str(path)).check(dims)
    path.write_text("[[1, 2]]")
    with pytest.raises(SkvError, match="not a table of patterns"):
        MInference(heads=str(path)).check(dims)
    with pytest.raises(SkvError, match="cannot read"):
        MInference(heads=str(tmp_path / "none")).check(dims)


@pytest.mark.parametrize("spec", ["shadowkv+minference", "quest:budget=64+minference:slash=7,vertical=3"])
def test_labels_are_read_back(spec):
    method = parse_method(spec)
    assert method.label == spec
    assert parse_method(method.label) == method
    assert "minference.vertical" in method.params()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("full+minfrence", "did you mean 'minference'"),
        ("full+minference:verticle=3", "did you mean 'vertical'"),
        ("full+minference:pattern=star", "one of vertical_slash"),
        ("full+minference:slash=0", "at least 1"),
        ("full+minference+minference", "more than one prefill"),
    ],
)
def test_bad_specs_are_one_clear_line(spec, says):
    with pytest.raises(SkvError, match=says.replace("(", r"\(")):
        parse_method(spec)
