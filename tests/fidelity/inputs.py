"""Seeded inputs on which a method and its authors' rule are asked the same, and what a method makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from tiny_models import tiny_model
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.contract.method import LayerKV, Method
from shadowkv.contract.sparse_prefill import SparsePrefill

ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Inputs:
    """Queries, keys and values of a prompt and of the steps that follow it, in each of a few layers.

    Numbers come from numpy's `RandomState`, whose stream is frozen for good. Keys are neither normalised nor of low
    rank; queries are made larger, so that attention is uneven. Where there are no more tokens than channels, values
    can be unit vectors: what comes out is then the attention that each token was given.
    """

    seed: int
    layers: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    prompt_tokens: int = 56
    steps: int = 4
    unit_values: bool = True
    query_scale: float = 3.0
    scaling: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", self.head_dim**-0.5)
        assert not self.unit_values or self.tokens <= self.head_dim

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.steps

    def _normal(self, part: int, heads: int) -> Tensor:
        stream = np.random.RandomState(self.seed * 10 + part)
        shape = (self.layers, 1, heads, self.tokens, self.head_dim)
        return torch.from_numpy(stream.standard_normal(shape).astype(np.float32))

    @property
    def pre_rope_keys(self) -> Tensor:
        """[L,1,H,n,D]"""
        return self._normal(0, self.kv_heads)

    @property
    def keys(self) -> Tensor:
        """After RoPE. [L,1,H,n,D]"""
        return rotated(self.pre_rope_keys)

    @property
    def queries(self) -> Tensor:
        """After RoPE. [L,1,Hq,n,D]"""
        return rotated(self.query_scale * self._normal(1, self.q_heads))

    @property
    def values(self) -> Tensor:
        """[L,1,H,n,D]"""
        if not self.unit_values:
            return self._normal(2, self.kv_heads)
        return torch.eye(self.tokens, self.head_dim).expand(self.layers, 1, self.kv_heads, -1, -1).clone()

    @property
    def guesses(self) -> Tensor:
        """What each layer's queries are foretold to be: near the true ones. [L,1,Hq,n,D]"""
        return self.queries + self._normal(3, self.q_heads)

    @property
    def rope(self) -> Rope:
        """The rotation of `keys`, as a method is given it."""
        rotary = {"rope_type": "default", "rope_theta": ROPE_THETA}
        return Rope(tiny_model("llama", num_hidden_layers=self.layers, head_dim=self.head_dim, rope_parameters=rotary))


def rotated(x: Tensor) -> Tensor:
    """RoPE, half against half, of tokens at positions 0, 1, 2, ... x [...,n,D]."""
    half = x.shape[-1] // 2
    frequencies = ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    cos, sin = (torch.cat((part, part), dim=-1).float() for part in (angles.cos(), angles.sin()))
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def answered(method: Method, given: Inputs) -> Tensor:
    """What attention gives under `method` in each step. [steps,L,Hq,D]"""
    q, k, v, guesses, n = given.queries, given.keys, given.values, given.guesses, given.prompt_tokens
    cache = method.new_state(given.rope)
    for layer in range(given.layers):
        prompt = q[layer][:, :, :n]
        depth = layer / max(given.layers - 1, 1)
        kv = LayerKV(k[layer][:, :, :n], v[layer][:, :, :n], prompt[:, :, -64:], given.scaling, prompt, depth=depth)
        cache.ingest(layer, kv)
    cache.complete()
    outs = []
    for t in range(n, given.tokens):
        new = slice(t, t + 1)
        cache.foresee(lambda layer, new=new: guesses[layer][:, :, new])
        step = [
            cache.attend(layer, q[layer][:, :, new], k[layer][:, :, new], v[layer][:, :, new], given.scaling)
            for layer in range(given.layers)
        ]
        outs.append(torch.stack(step)[:, 0, :, 0])
    return torch.stack(outs)


def attended(method: Method, given: Inputs) -> list[list[list[list[int]]]]:
    """The tokens that each query head attends to: by step, layer and head, ascending."""
    assert given.unit_values
    return [[[head.nonzero()[:, 0].tolist() for head in layer] for layer in step] for step in answered(method, given)]


def read(prefill: SparsePrefill, given: Inputs, queries: list[int]) -> list[list[list[list[list[int]]]]]:
    """The tokens that these queries of the prompt read: by layer, head and query, first and last of each run."""
    n, width, heads = given.prompt_tokens, given.head_dim, given.kv_heads
    layers = []
    for q, k in zip(given.queries[..., :n, :], given.keys[..., :n, :], strict=True):
        # Unit values, as many channels of them at a time as there are.
        units = torch.eye(n, -(-n // width) * width).split(width, dim=1)
        parts = [prefill.attention(0, q, k, unit.expand(1, heads, n, width), given.scaling) for unit in units]
        weights = torch.cat(parts, dim=-1)[0, :, queries, :n]
        layers.append([[runs(weight > 0) for weight in head] for head in weights])
    return layers


def runs(chosen: Tensor) -> list[list[int]]:
    """First and last index of every run of True. chosen bool [n]."""
    edges = torch.nn.functional.pad(chosen.int(), (1, 1)).diff()
    return torch.stack(((edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0] - 1), dim=1).tolist()
