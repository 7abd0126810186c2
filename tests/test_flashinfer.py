"""The adapter to FlashInfer against a stand-in that follows its documentation.

FlashInfer itself is not there: these tests say nothing about whether its calls are still these, or fast.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from evals.bench.kernels.cases import Case, attention_inputs
from evals.bench.kernels.flashinfer_decode import missing, whole_context
from evals.bench.kernels.items import Item, Subject, Way
from evals.bench.kernels.kernels import KernelBench
from shadowkv.kernels import slots
from shadowkv.kernels.slots import Regions


class Decode:
    """`BatchDecodeWithPagedKVCacheWrapper`, as far as its documentation says and in plain torch."""

    def __init__(self, workspace, kv_layout, use_cuda_graph, use_tensor_cores, **buffers):
        assert workspace.dtype == torch.uint8
        assert not workspace.any()
        assert (kv_layout, use_cuda_graph) == ("HND", True)
        self.tensor_cores = use_tensor_cores
        names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
        self.buffers = [buffers.pop(name) for name in names]
        assert not buffers

    def plan(self, indptr, indices, last, heads, kv_heads, head_dim, page, *, q_data_type, kv_data_type, sm_scale):
        for given, buffer in zip((indptr, indices, last), self.buffers, strict=True):
            assert given.dtype == torch.int32
            assert given.shape == buffer.shape
            assert given.data_ptr() != buffer.data_ptr()
        self.indptr, self.indices, self.last, self.scale = indptr.tolist(), indices, last.tolist(), sm_scale
        assert self.tensor_cores == (heads // kv_heads >= 4), "as serving engines choose"
        self.q_shape, self.page_shape = (len(last), heads, head_dim), (kv_heads, page, head_dim)
        self.types = [q_data_type, kv_data_type, kv_data_type]

    def run(self, q, pages):
        assert q.shape == self.q_shape
        assert [x.dtype for x in (q, *pages)] == self.types
        assert all(x.shape[1:] == self.page_shape and x.is_contiguous() for x in pages)
        rows = []
        for row, tokens in enumerate(self.last):
            mine = self.indices[self.indptr[row] : self.indptr[row + 1]]
            held = (len(mine) - 1) * self.page_shape[1] + tokens
            k, v = (x[mine].transpose(0, 1).flatten(1, 2)[None, :, :held] for x in pages)
            attend = torch.nn.functional.scaled_dot_product_attention
            rows.append(attend(q[row][None, :, None], k, v, scale=self.scale, enable_gqa=True)[0, :, 0])
        return torch.stack(rows)


@pytest.fixture
def stand_in(monkeypatch):
    module = ModuleType("flashinfer")
    module.__spec__ = SimpleNamespace(name="flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Decode
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr("evals.bench.kernels.flashinfer_decode._WORKSPACE_BYTES", 16)
    return module


@pytest.fixture
def without_a_gpu(stand_in, monkeypatch):
    """The stand-in runs anywhere."""
    monkeypatch.setattr("evals.bench.kernels.flashinfer_decode.missing", lambda *_: None)


def _records(case):
    """Of the twin, and of FlashInfer beside it, by a scale that is nobody's default."""

    def make():
        inputs = attention_inputs(case, Regions(0, 0, case.tokens), [[0, 0, 0, case.tokens]] * case.batch)
        inputs["scaling"] = 0.3
        q, k, v = (inputs[name] for name in ("q", "k", "v"))

        def twin():
            return slots.attend_resident(**inputs)

        way = Way("flashinfer", lambda: [whole_context(q, k, v, 0.3)], True)
        return Subject((twin,), (twin,), 2e-2, besides=(way,))

    return KernelBench(torch.device("cpu"), "here", "twin").measure(Item("attend_resident", "", make))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("chunks", [6, 5], ids=["16 a page", "8 a page"])
def test_pages_hold_what_the_twin_attends_to(without_a_gpu, chunks, group):
    _, found = _records(Case(batch=3, group=group, chunks=chunks, dtype=torch.bfloat16))
    assert (found.status, found.error) == ("ok", None)
    assert found.relative_error < found.bound


def test_a_package_that_fails_is_one_line(without_a_gpu, monkeypatch):
    def run(*_):
        raise ValueError("Unsupported\nhead_dim")

    monkeypatch.setattr(Decode, "run", run)
    kernel, found = _records(Case(dtype=torch.bfloat16))
    assert kernel.status == "ok"
    assert (found.status, found.error) == ("error", "flashinfer: ValueError: Unsupported head_dim")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cuda", torch.bfloat16, 128, None),
        ("cuda", torch.float32, 128, "16 bits"),
        ("cuda", torch.bfloat16, 96, "heads of 64, 128 or 256"),
        ("cpu", torch.bfloat16, 128, "needs a GPU"),
    ],
)
def test_it_is_asked_where_it_is_installed_and_has_kernels(stand_in, device, dtype, head_dim, reason):
    said = missing(device, dtype, head_dim)
    assert said is None if reason is None else reason in said


def test_it_is_skipped_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing("cuda", torch.bfloat16, 128) == "FlashInfer is not installed"


def test_a_cpu_skips_it_with_the_reason():
    kernel, found = _records(Case(dtype=torch.bfloat16))
    assert kernel.status == "ok"
    assert (found.status, found.error) == ("skipped", "FlashInfer needs a GPU")
