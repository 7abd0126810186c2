"""ShadowKV and the KV-cache methods it is compared with, for any Hugging Face RoPE decoder.

What is listed here is the public API (docs/library.md); what is not may change. Nothing is imported until it is used.

Notation used throughout: B batch, S prompt tokens, n tokens held so far, T new tokens, Hq / H query and
key-value heads, G = Hq / H, D head size, W = H * D the width of a layer's keys, C chunks, c tokens per chunk.

Not here: benchmarks, scores, anything that prints.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shadowkv.common.errors import SkvError
    from shadowkv.contract.method import DecodeCache, LayerKV, Method
    from shadowkv.contract.registry import methods as list_methods
    from shadowkv.contract.registry import parse_method
    from shadowkv.engine.drop_in import new_cache
    from shadowkv.engine.engine import Engine
    from shadowkv.models.named import load

_HOMES = MappingProxyType(
    {
        "DecodeCache": "shadowkv.contract.method",
        "Engine": "shadowkv.engine.engine",
        "LayerKV": "shadowkv.contract.method",
        "Method": "shadowkv.contract.method",
        "SkvError": "shadowkv.common.errors",
        "list_methods": "shadowkv.contract.registry",
        "load": "shadowkv.models.named",
        "new_cache": "shadowkv.engine.drop_in",
        "parse_method": "shadowkv.contract.registry",
    }
)
__all__ = [
    "DecodeCache",
    "Engine",
    "LayerKV",
    "Method",
    "SkvError",
    "list_methods",
    "load",
    "new_cache",
    "parse_method",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shadowkv' has no attribute '{name}'")
    # `shadowkv.methods` is the folder of methods, so the registry's function has another name here.
    return getattr(importlib.import_module(_HOMES[name]), "methods" if name == "list_methods" else name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
