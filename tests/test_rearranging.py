"""Chunks of generated tokens on their way into the context: one sequence of operations, whichever rows they are of."""

from __future__ import annotations

import pytest
import torch
from test_graphs import batch, tensors
from test_resident import SPECS
from tiny_models import random_prompt
from torch.utils._python_dispatch import TorchDispatchMode

from shadowkv.contract.registry import parse_method
from shadowkv.engine.engine import Engine
from shadowkv.tensors.pinned import empty_pinned
from shadowkv.tensors.ragged import RaggedBuffer
from shadowkv.tensors.registered import _Registered, as_seen_by

# Operations for which the host waits for a GPU, or with which it sends one numbers that no graph would read again.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "lift_fresh", "unique_dim"}
LENGTHS = (158, 150, 97)


class Noted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        self.names.append(operation.overloadpacket.__name__)
        masks = [x for x in arguments[1] if x is not None] if self.names[-1] in ("index", "index_put_") else []
        assert not any(mask.dtype == torch.bool for mask in masks), "the host has to count what is meant"
        return operation(*arguments, **(named or {}))


def layers_of(engine, spec, tokens=0, lengths=LENGTHS):
    cache = batch(engine, parse_method(f"{spec},engine=fast"), lengths)
    for token in random_prompt(tokens, batch=len(lengths), seed=5).split(1, dim=1) if tokens else ():
        engine.extend(cache, token)
    return list(cache._shares[0].cache.layers.values())


@pytest.mark.parametrize("spec", SPECS)
@torch.inference_mode()
def test_nothing_in_it_waits_for_the_device_and_it_is_the_same_whatever_is_due(tiny, spec):
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    counted = []
    for tokens in (38, 39, 40):  # the second time all are due
        layer = layers_of(engine, spec, tokens)[0]
        with Noted() as noted:
            layer.rearrange()
        assert not set(noted.names) & WAITS
        counted.append(noted.names)
    assert all(names == counted[0] for names in counted)


@pytest.mark.parametrize("spec", SPECS)
@torch.inference_mode()
def test_rows_whose_time_it_is_not_stay_as_they_are_to_the_bit(tiny, spec):
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    layer = layers_of(engine, spec, 21)[0]
    while layer.rearranges:
        layer.rearrange()
        layer.make_room()
    before = [x.clone().view(-1).view(torch.uint8) for x in tensors(layer)]
    layer.rearrange()
    for now, then in zip(tensors(layer), before, strict=True):
        assert torch.equal(now.view(-1).view(torch.uint8), then)


def test_the_device_counts_as_the_host_does(tiny):
    engine = Engine(tiny("llama"), prefill_chunk_tokens=128)
    for tokens in (7, 15, 16, 17, 60):
        for layer in layers_of(engine, SPECS[0], tokens):
            rows = layer._tails.rows
            gone = [row.chunks_gone(8, 8) for row in rows]
            assert gone == [max(0, (tokens - 8) // 8)] * 3
            assert layer._counts.tolist() == layer._tails.landmarks()
            assert layer._places[:, 0].tolist() == [
                row.context_tokens + 8 * count for row, count in zip(rows, gone, strict=True)
            ]
            held = [row.tail_tokens + tokens - 8 * count for row, count in zip(rows, gone, strict=True)]
            assert layer._spans[:, 3].tolist() == held


def test_what_is_written_goes_to_the_rows_that_are_meant():
    buffer = RaggedBuffer(torch.zeros(3, 2, 8, 4), 2, 0)
    places, x = torch.tensor([[1, 2], [6, 7], [0, 1]]), torch.ones(3, 2, 2, 4)
    buffer.put(places, x, torch.tensor([True, True, False]))
    assert buffer.data.sum(dim=(1, 3)).nonzero().tolist() == [[0, 1], [0, 2], [1, 6], [1, 7]]
    assert buffer.data.max() == 1


def test_memory_of_the_host_is_told_by_its_address_and_bytes():
    x = torch.randn(2, 3).bfloat16()
    told = _Registered(x).__cuda_array_interface__
    assert told["data"] == (x.data_ptr(), False)
    assert (told["shape"], told["typestr"], told["strides"]) == ((12,), "|u1", None)
    assert as_seen_by(torch.device("cpu"), x) is x
    assert as_seen_by(torch.device("cuda", 0), x) is x, "not pinned: the host has to write it"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8])
def test_a_gpu_writes_pinned_memory_by_itself(dtype):
    device = torch.device("cuda", 0)
    x = empty_pinned((2, 3, 4, 5), dtype).zero_()
    seen = as_seen_by(device, x)
    assert (seen.device, seen.dtype, seen.shape) == (device, dtype, x.shape)
    index = torch.full((2, 3, 1, 5), 2, device=device)
    seen.scatter_(2, index, torch.ones(2, 3, 1, 5, dtype=dtype, device=device))
    torch.cuda.synchronize()
    assert x[:, :, 2].eq(1).all()
    assert x.float().sum() == 2 * 3 * 5
