"""A layer of a prompt as ShadowKV keeps it: what is factorised, what stands for chunks, what stays exact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shadowkv.anatomy.rope import Rope
from shadowkv.contract.method import LayerKV
from shadowkv.methods.shadowkv.key_factors import KeyFactors
from shadowkv.methods.shadowkv.landmarks import Landmarks
from shadowkv.methods.shadowkv.settings import ShadowKVSettings
from shadowkv.tensors import ops
from shadowkv.tensors.stored import CodedTokens


class Prompt(NamedTuple):
    """One layer of a prompt as ShadowKV sees it: tokens [0, context) are chunks, the rest is the exact tail."""

    factors: KeyFactors
    values: CodedTokens
    landmarks: Landmarks
    outlier_k: Tensor  # [B,H,o*c,D]
    outlier_v: Tensor
    tail_k: Tensor  # [B,H,n-context,D]
    tail_v: Tensor


def divide(method: ShadowKVSettings, layer: int, kv: LayerKV, rope: Rope, *, offload: bool) -> Prompt:
    """ShadowKV, algorithm 1: factors of the keys before RoPE, landmarks of those after it, outliers.

    Values go to the host with `offload`, else they stay where they are.
    """
    tokens = kv.k.shape[2]
    context = method.context_tokens(tokens)
    keys, values = kv.k[:, :, :context], kv.v[:, :, :context]

    def before(first: int, end: int) -> Tensor:
        return pre_rope(rope, layer, kv.k[:, :, first:end], first, tokens)

    factors = KeyFactors.of(
        before, tokens, context, method.rank, method.energy, method.factors, kv.k.dtype, made_up=kv.made_up
    )
    landmarks, outliers = Landmarks.of(keys, method.chunk, method.outlier_chunks)
    return Prompt(
        factors,
        CodedTokens(values, method.values, offload),
        landmarks,
        ops.gather_tokens(keys, outliers),
        ops.gather_tokens(values, outliers),
        kv.k[:, :, context:],
        kv.v[:, :, context:],
    )


def pre_rope(rope: Rope, layer: int, keys: Tensor, first: int, length: int) -> Tensor:
    """Keys of consecutive positions from `first` on, before RoPE. [B,H,n,D] -> [B,n,W] fp32."""
    return pre_rope_at(rope, layer, keys, torch.arange(first, first + keys.shape[2], device=keys.device), length)


def pre_rope_at(rope: Rope, layer: int, keys: Tensor, positions: Tensor, length: int) -> Tensor:
    """Keys before RoPE, of positions [n] or [B,1,n]. [B,H,n,D] -> [B,n,W] fp32."""
    return rope.unrotate(layer, keys, positions, length).transpose(1, 2).flatten(2)
