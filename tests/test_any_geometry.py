"""A step of kernels, one after the other, on shapes, lengths and hits that nobody thought of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, key_inputs
from test_kernels import close, kernels

from evals.bench.kernels.cases import scores_inputs, stored_values
from shadowkv.kernels import slots

hypothesis = pytest.importorskip("hypothesis")  # not on a machine that is there to test kernels
st = hypothesis.strategies


@hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    st.builds(
        Case,
        batch=st.integers(1, 3),
        heads=st.integers(1, 3),
        group=st.integers(1, 8),
        head_dim=st.sampled_from([16, 48, 64, 96, 128]),
        chunks=st.integers(12, 60),
        slots=st.integers(1, 12),
        chunk=st.integers(1, 9),
        rank=st.integers(1, 70),
        values=st.sampled_from(["native", "int8", "fp8", "int4"]),
        factors=st.sampled_from(["native", "int8"]),
    ),
    st.data(),
)
def test_any_geometry(kernel_device, case, data):
    """One step, kernel after kernel, on random shapes, lengths and hits."""
    case = replace(case, device=kernel_device)
    counts = data.draw(st.lists(st.integers(0, case.chunks), min_size=case.batch, max_size=case.batch))
    inputs = scores_inputs(case, counts)
    scores = kernels().chunk_scores(**inputs)
    close(scores, slots.chunk_scores(**inputs))
    numbers = torch.arange(case.chunks, device=kernel_device).int().expand(scores.shape).contiguous()
    chosen = kernels().choose_chunks(scores, numbers, case.slots)
    assert torch.equal(chosen, slots.choose_chunks(scores, numbers, case.slots))
    held = torch.full_like(chosen, -1)
    fill = kernels().plan_fill(chosen, held)
    stored, keys = stored_values(case), key_inputs(case)
    blank = torch.zeros(case.batch, case.heads, case.slots * case.chunk + 9, case.head_dim, device=kernel_device)
    for name, given_ in (("fill_values", {"stored": stored}), ("fill_keys", keys)):
        got, wanted = blank.clone(), blank.clone()
        getattr(kernels(), name)(**given_, held=held, fill=fill, chunk=case.chunk, out=got)
        getattr(slots, name)(**given_, held=held, fill=fill, chunk=case.chunk, out=wanted)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
