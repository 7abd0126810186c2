"""Probes of what attention does not do: a decoder layer's norms, projections, rotary embedding and MLP, in a graph.

They need transformers too. What they find decides whether a way to fuse these is worth using: see docs/gpu-day.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evals.bench.timing import Clock, step_times

_ROWS = 8
_TIMES, _CALLS = 20, 4
# Llama-3.1-8B's.
_SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
_TINY_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def dense_layer(device: torch.device, tiny: bool) -> dict[str, Any]:
    """us of a layer as transformers runs it: one new token of 8 rows, which attends to nothing but itself."""
    layer, call = _layer(device, tiny)
    weights = sum(weight.nbytes for weight in layer.parameters())
    return {"rows": _ROWS, "weights_mb": round(weights / 1e6, 1), "us": _us(call, device)}


def compiled_dense_layer(device: torch.device, tiny: bool, backend: str = "inductor") -> dict[str, Any]:
    """us of the same with norms and MLP compiled by torch, and of all of it compiled; by how much results differ.

    The first is what an engine can have whose attention is its own, the second is more than it can have.
    """
    layer, call = _layer(device, tiny)
    found: dict[str, Any] = {"us": _us(call, device)}
    expected = call().float()
    for child in layer.children():
        if "position_embeddings" not in inspect.signature(child.forward).parameters:  # attention is given them
            child.compile(backend=backend, dynamic=False)
    found |= {"parts_us": _us(call, device), "parts_differ_by": _apart(call(), expected)}
    layer, call = _layer(device, tiny)
    layer.compile(backend=backend, dynamic=False)
    return found | {"whole_us": _us(call, device), "whole_differs_by": _apart(call(), expected)}


def _layer(device: torch.device, tiny: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The first layer of a model with random weights, the same every time, and a call of it as the model makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from shadowkv.anatomy.geometry import decoder_layers

    sizes = _TINY_SIZES if tiny else _SIZES
    config = AutoConfig.for_model("llama", vocab_size=32, num_hidden_layers=1, **sizes)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    layer, given = decoder_layers(model)[0], list[tuple[Any, Any]]()
    hook = layer.register_forward_pre_hook(lambda _, args, named: given.append((args, named)), with_kwargs=True)
    with torch.inference_mode():
        model(torch.arange(_ROWS, device=device)[:, None], use_cache=False)
    hook.remove()
    [(args, named)] = given

    @torch.inference_mode()
    def call() -> Tensor:
        made: Tensor = layer(*args, **named)
        return made

    return layer, call


def _us(call: Callable[[], object], device: torch.device) -> float:
    """The median of a call, on a GPU of several in one graph, whose weights no cache holds."""
    for _ in range(3):
        call()  # what compiles does so here
    on_gpu = device.type == "cuda"
    run, calls = (_graph_of(call, device), _CALLS) if on_gpu else (call, 1)
    times = sorted(step_times(lambda: (run(), None)[1], 3, _TIMES if on_gpu else 3, Clock(device)))
    return round(1000 * times[len(times) // 2] / calls, 1)


def _graph_of(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    return graph.replay


def _apart(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    return float(((got.float() - expected).abs().max() / expected.abs().max()).cpu())
