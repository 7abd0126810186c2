"""Operations against brute force."""

from __future__ import annotations

import pytest
import torch

from shadowkv.tensors import low_rank, ops
from shadowkv.tensors.buffers import TokenBuffer


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("q_heads", "heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_attend_over_segments_is_attention_over_their_union(q_heads, heads, tokens):
    q, k, v = rand(2, q_heads, tokens, 8), rand(2, heads, 30, 8, seed=1), rand(2, heads, 30, 8, seed=2)
    got = ops.attend(q, [(k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 11), (11, 11), (11, 30))], scaling=0.3)
    wide_k, wide_v = (x.repeat_interleave(q_heads // heads, dim=1) for x in (k, v))
    scores = q @ wide_k.mT * 0.3
    for t in range(tokens):
        scores[:, :, t, 30 - tokens + t + 1 :] = float("-inf")
    torch.testing.assert_close(got, scores.softmax(-1) @ wide_v)


def test_top_indices_are_sorted_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 5.0, 5.0, 0.0, 5.0, 7.0]])
    assert ops.top_indices(scores, 3).tolist() == [[1, 2, 5]]
    assert ops.top_indices(scores, 99).tolist() == [list(range(6))]


@pytest.mark.parametrize("count", [0, 1, 7, 39, 40, 50])
def test_top_indices_are_those_of_a_stable_sort(count):
    scores = rand(2, 3, 40).mul(2).round()  # many ties
    scores[0, 0] = 0
    scores[0, 1, ::2] = float("-inf")
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values
    assert torch.equal(ops.top_indices(scores, count), expected)
    mask = torch.zeros(2, 3, 40, dtype=torch.bool).scatter(2, expected, True)
    assert torch.equal(ops.top_mask(scores, count), mask)


def test_the_weakest_of_ties_is_the_last():
    assert ops.weakest(torch.tensor([[3.0, 1.0, 2.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0]])).tolist() == [[3], [4]]


@pytest.mark.parametrize(("q_heads", "heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("queries", [1, 13, 40])
def test_received_attention_is_the_column_sum_of_causal_attention(monkeypatch, q_heads, heads, queries):
    q, k = rand(2, q_heads, queries, 8), rand(2, heads, 40, 8, seed=1)
    scores = q @ k.repeat_interleave(q_heads // heads, dim=1).mT * 0.5
    scores = scores.masked_fill(torch.ones(queries, 40, dtype=torch.bool).triu(40 - queries + 1), float("-inf"))
    expected = scores.softmax(-1).sum(2).view(2, heads, -1, 40)
    for at_once in (1, 7 * q_heads * 40, 2**25):  # one query at a time, blocks that do not divide, one block
        monkeypatch.setitem(ops._SCORES_AT_ONCE, "cpu", at_once)
        got = ops.received_attention(q, k, 0.5)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(got.sum(-1), torch.full((2, heads, q_heads // heads), float(queries)))


def test_weights_and_values_make_attention():
    q, k, v = rand(2, 6, 1, 8), rand(2, 2, 30, 8, seed=1), rand(2, 2, 30, 8, seed=2)
    got = ops.weighted_values(ops.attention_weights(q, k, 0.3), v)
    torch.testing.assert_close(got, ops.attend(q, [(k, v)], 0.3))


def test_lists_gather_for_each_head_their_own():
    x, index = rand(2, 2, 30, 4), torch.randint(30, (2, 2, 3, 5), generator=torch.Generator().manual_seed(0))
    got = ops.gather_lists(x, index).view(2, 2, 3, 5, 4)
    for b, h, one in [(0, 0, 0), (1, 0, 2), (0, 1, 1)]:
        assert torch.equal(got[b, h, one], x[b, h, index[b, h, one]])


def test_a_buffer_overwrites_its_own_copy_only():
    start = rand(1, 2, 6, 4)
    kept, new, index = start.clone(), rand(1, 2, 1, 4, seed=1), torch.tensor([[[3], [5]]])
    buffer = TokenBuffer(start, axis=2)
    buffer.put(index, new)
    assert torch.equal(start, kept)
    assert torch.equal(ops.gather_tokens(buffer.view, index), new)
    assert buffer.nbytes() == start.numel() * 4
    buffer.append(new)
    buffer.put(torch.tensor([[[6], [6]]]), 2 * new)
    assert torch.equal(buffer.view[:, :, 6:], 2 * new)
    assert torch.equal(buffer.view[:, 0, [0, 1, 2, 4, 5]], kept[:, 0, [0, 1, 2, 4, 5]])


@pytest.mark.parametrize("page", [1, 4])
def test_page_bounds_bound_and_are_exact_for_single_tokens(page):
    q, k = rand(2, 4, 1, 8), rand(2, 2, 32, 8, seed=1)
    paged = k.view(2, 2, 32 // page, page, 8)
    bounds = ops.page_bounds(q, paged.amin(3), paged.amax(3))
    best = torch.einsum("bhgd,bhpcd->bhgpc", q.view(2, 2, 2, 8), paged).amax(-1)
    assert (bounds >= best - 1e-5).all()
    if page == 1:
        torch.testing.assert_close(bounds, best)


def test_chunk_scores_take_the_best_query_of_a_group():
    q, landmarks = rand(1, 4, 1, 8), rand(1, 2, 10, 8, seed=1)
    got = ops.chunk_scores(q, landmarks, 0.5)
    for head in range(2):
        each = [(landmarks[0, head] @ q[0, 2 * head + g, 0] * 0.5).softmax(-1) for g in range(2)]
        torch.testing.assert_close(got[0, head], torch.maximum(*each))
    torch.testing.assert_close(got, ops.chunk_scores(q, landmarks + 0 * got[..., None], 0.5))


def spectrum(rank, rows=400, width=24, seed=0):
    """A matrix with known singular values, and those values."""
    left, _ = torch.linalg.qr(rand(rows, width, seed=seed).double())
    right, _ = torch.linalg.qr(rand(width, width, seed=seed + 1).double())
    values = torch.linspace(10, 0.1, width).double()
    values[rank:] = 0
    return (left * values @ right.mT).float()[None], values


def test_low_rank_error_is_the_tail_of_the_spectrum():
    x, values = spectrum(24)
    errors = []
    for rank in (1, 4, 12, 23, 24):
        directions = low_rank.fit([x], rank)
        rebuilt = low_rank.project(x, directions) @ directions
        errors.append((x - rebuilt).norm().item())
        assert errors[-1] == pytest.approx(values[rank:].square().sum().sqrt().item(), abs=2e-5)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_principal_components_do_not_see_a_bias():
    x, _ = spectrum(4)
    with_bias, without = (low_rank.fit([y], 4, centred=True) for y in (x + 100.0, x))
    torch.testing.assert_close(with_bias.mT @ with_bias, without.mT @ without, rtol=0, atol=1e-4)
    biased = low_rank.fit([x + 100.0], 1)
    assert biased.abs().std().item() < 1e-3, "around zero the bias is the first direction"


def test_a_prompt_in_pieces_has_the_basis_of_the_whole():
    x = spectrum(24)[0] + 100.0
    x[:, 100:] += rand(1, 1, x.shape[-1], seed=9)  # the mean of the first piece is not that of all
    for centred in (True, False):
        whole = low_rank.fit([x], 12, centred=centred)
        for pieces in (x.split(7, dim=1), x.split(100, dim=1), [x[:, :1], x[:, 1:]]):
            directions = low_rank.fit(iter(pieces), 12, centred=centred)
            projected = [low_rank.project(x, d) @ d for d in (directions, whole)]
            torch.testing.assert_close(*projected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_picks_the_smallest_sufficient_rank(energy):
    x, _ = spectrum(24)
    values = torch.linalg.svdvals(x.double()[0]).square()
    rank = low_rank.fit([x], 1, energy).shape[1]
    assert values[:rank].sum() >= energy * values.sum() * (1 - 1e-9)
    assert rank == 1 or values[: rank - 1].sum() < energy * values.sum()


def test_small_singular_values_survive_the_gram_matrix():
    """fp32 products would lose everything below 1e-4 of the largest value."""
    x, _ = spectrum(24)
    x = x + 1e4 * rand(1, 400, 1, seed=5)  # one huge direction that every column takes part in
    best = torch.linalg.svdvals(x[0].double())[20:].square().sum().sqrt().item()
    vectors = low_rank.fit([x], 20).double()
    left_over = x.double() - x.double() @ vectors.mT @ vectors
    assert left_over.norm().item() == pytest.approx(best, rel=0.02)


WIDTH, WANTED = 256, 32  # as many as `leading` takes: what it follows is a quarter of the width
SPECTRA = {
    "flat": torch.ones(WIDTH),
    "slow": 0.99 ** torch.arange(WIDTH),
    "like keys": (1.0 + torch.arange(WIDTH)) ** -0.5,
    "steep": (1.0 + torch.arange(WIDTH)) ** -2.0,
    "a gap": torch.where(torch.arange(WIDTH) < WANTED, 1.0, 0.1),
    "a gap too early": torch.where(torch.arange(WIDTH) < WANTED // 2, 1.0, 0.1),
}


def gram_of(spectrum, batch=2, seed=0):
    """Of noise with these scales along random axes, other ones in every row. [B,W,W] fp64."""
    x = rand(batch, 4 * WIDTH, WIDTH, seed=seed).double() * spectrum
    x = x @ torch.linalg.qr(rand(batch, WIDTH, WIDTH, seed=seed + 1).double())[0]
    return x.mT @ x


def held_by(gram, vectors):
    return (vectors.mT @ gram @ vectors).diagonal(dim1=-2, dim2=-1).sum(-1)


@pytest.mark.parametrize("name", SPECTRA)
def test_leading_vectors_hold_as_much_as_eighs(name):
    gram = gram_of(SPECTRA[name])
    best = torch.linalg.eigh(gram)[1].flip(-1)[..., :WANTED]
    found = low_rank.leading(gram, WANTED)
    torch.testing.assert_close(found.mT @ found, torch.eye(WANTED).double().expand(2, -1, -1), atol=1e-12, rtol=0)
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    most, held = held_by(gram, best), held_by(gram, found)
    assert ((most - held) / most).max() < 1e-6
    assert ((total - held) / (total - most)).max() < 1 + 1e-3
    assert (held_by(gram, found[..., :5]) / held_by(gram, best[..., :5])).min() > 1 - 1e-6, "the strongest first"
    if name == "a gap":
        torch.testing.assert_close(found @ found.mT, best @ best.mT, atol=1e-8, rtol=0)


def test_leading_vectors_are_the_same_every_time():
    gram = gram_of(SPECTRA["flat"])
    found = low_rank.leading(gram, WANTED)
    state = torch.random.get_rng_state()
    torch.rand(7)
    assert torch.equal(low_rank.leading(gram, WANTED), found)
    torch.random.set_rng_state(state)
    low_rank.leading(gram, WANTED)
    assert torch.equal(torch.random.get_rng_state(), state), "a seed of its own"


@pytest.mark.parametrize("tokens", [0, WANTED, 300])
def test_a_fit_by_products_is_that_by_eigenvectors(monkeypatch, tokens):
    """Nothing, and what has fewer directions than are followed, is left to eigh."""
    x = rand(2, tokens, WIDTH) * SPECTRA["a gap"]
    wanted = low_rank.fit([x], WANTED)
    monkeypatch.setattr(low_rank, "_iterates", lambda *_: True)
    got = low_rank.fit([x], WANTED)
    settled = low_rank.leading(x.double().mT @ x.double(), WANTED) is not None
    assert settled == (tokens == 300)
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted) or settled
    left = [(x - low_rank.project(x, d) @ d).norm().item() for d in (got, wanted)]
    assert left[0] == pytest.approx(left[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("device", "width", "rank", "yes"),
    [("cuda", 1024, 160, True), ("cpu", 1024, 160, False), ("cuda", 1024, 256, False), ("cuda", 192, 24, False)],
)
def test_products_are_for_gpus_and_few_of_many_directions(device, width, rank, yes):
    assert low_rank._iterates(device, width, rank) == yes


def test_what_holds_a_share_of_energy_needs_every_eigenvalue(monkeypatch):
    monkeypatch.setattr(low_rank, "_iterates", lambda *_: True)
    monkeypatch.setattr(low_rank, "leading", lambda *_: pytest.fail("it knows only those it follows"))
    assert low_rank.fit([rand(1, 50, 24)], 1, 0.5).shape[1] > 1


def test_rebuild_gathers_rows_for_each_head():
    coefficients, vectors = rand(2, 20, 3), rand(2, 3, 8, seed=1)
    index = torch.randint(0, 20, (2, 2, 5), generator=torch.Generator().manual_seed(3))
    dense = (coefficients @ vectors).view(2, 20, 2, 4).transpose(1, 2)
    torch.testing.assert_close(ops.rebuild(coefficients, vectors, index), ops.gather_tokens(dense, index))


def test_token_buffer_never_writes_to_what_it_was_given():
    start = rand(1, 2, 10, 4)
    before = start.clone()
    buffer = TokenBuffer(start, axis=2, grow_tokens=3)
    expected = start
    for step in range(40):
        x = rand(1, 2, 1 + step % 3, 4, seed=step)
        buffer.append(x)
        expected = torch.cat((expected, x), dim=2)
        if step % 4 == 3:
            buffer.drop_front(2)
            expected = expected[:, :, 2:]
        assert torch.equal(buffer.view, expected)
        assert len(buffer) == expected.shape[2]
    assert torch.equal(start, before)
    assert buffer.nbytes() >= expected.numel() * 4


def test_token_buffer_appends_in_place_and_counts_its_spare_room():
    buffer = TokenBuffer(rand(1, 2, 10, 4), axis=2, grow_tokens=8)
    assert buffer.nbytes() == 2 * 10 * 4 * 4, "nothing but what it was given"
    places = set()
    for _ in range(9):
        buffer.append(rand(1, 2, 1, 4))
        places.add(buffer.view.data_ptr())
        assert buffer.nbytes() == 2 * (10 + 1 + 8) * 4 * 4
    assert len(places) == 1


def test_bf16_scores_are_as_exact_in_several_segments_as_in_one():
    """Products of bf16 numbers rounded to bf16 would move a softmax by percents where some channels are large."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 500, 64), torch.randn(1, 2, 500, 64)
    q[..., :4] *= 8
    k[..., :4] *= 30
    q, k, v = (x.bfloat16() for x in (q, k, v))
    exact = ops.attend(q.double(), [(k.double(), v.double())], 0.125)
    for cut in (500, 300):
        segments = [(k[:, :, :cut], v[:, :, :cut]), (k[:, :, cut:], v[:, :, cut:])]
        got = ops.attend(q, segments, 0.125).double()
        assert ((got - exact).norm() / exact.norm()).item() < 0.01
