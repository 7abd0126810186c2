"""Names of methods: found by being in `shadowkv/methods/`, parsed from `name:key=value,key=value`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean
from shadowkv.contract.method import Method
from shadowkv.contract.setting import Setting
from shadowkv.contract.sparse_prefill import SparsePrefill
from shadowkv.contract.with_prefill import WithPrefill

S = TypeVar("S", bound=Setting)
_PLUS = re.compile(r"\+(?=[A-Za-z]\w*(?:[:+]|$))")  # a name follows: not the one of 1e+5, nor of a file a+b.json


@cache
def methods() -> dict[str, type[Method]]:
    """Every method there is, by name; full attention first."""
    found = {cls.name: cls for cls in _defined() if issubclass(cls, Method)}
    return dict(sorted(found.items(), key=lambda item: (item[0] != "full", item[0])))


@cache
def prefills() -> dict[str, type[SparsePrefill]]:
    """Every way to compute a prompt other than densely, by name."""
    return {cls.name: cls for cls in _defined() if issubclass(cls, SparsePrefill)}


def _defined() -> Iterator[type[Setting]]:
    """The concrete settings that modules of `shadowkv.methods` and of its folders define."""
    package = importlib.import_module("shadowkv.methods")
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            own = cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
            if own and issubclass(cls, Setting) and not inspect.isabstract(cls):
                yield cls


def parse_method(spec: str) -> Method:
    """Read `"shadowkv:rank=64,budget=256"`, or `"shadowkv:rank=64+minference"` for one with a sparse prefill.

    Raises `SkvError` on an unknown name, key or value.
    """
    name, *rest = _PLUS.split(spec.strip())
    method = _parse("method", methods(), name)
    if len(rest) > 1:
        raise SkvError(f"'{spec.strip()}' names more than one prefill")
    return WithPrefill(method, _parse("prefill", prefills(), rest[0])) if rest else method


def _parse(kind: str, known: Mapping[str, type[S]], spec: str) -> S:
    """Read `name:key=value,key=value`."""
    name, _, listed = spec.strip().partition(":")
    if name not in known:
        raise SkvError(f"unknown {kind} '{name}'{did_you_mean(name, known)}; {kind}s: {', '.join(known)}")
    cls = known[name]
    types_by_key = get_type_hints(cls)
    keys = [f.name for f in fields(cls)]
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in listed.split(","))):
        key, equals, text = (part.strip() for part in item.partition("="))
        valid = f"parameters of {name}: {', '.join(keys) or 'none'}"
        if key not in keys:
            raise SkvError(f"unknown parameter '{key}' of {kind} {name}{did_you_mean(key, keys)}; {valid}")
        if not equals or not text:
            raise SkvError(f"'{item}' of {kind} {name} is not of the form key=value; {valid}")
        if key in values:
            raise SkvError(f"parameter '{key}' of {kind} {name} is given twice")
        values[key] = _parse_value(types_by_key[key], text, f"{name}:{key}")
    return cls(**values)


def _parse_value(hint: Any, text: str, where: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if text.lower() in ("auto", "none"):
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    try:
        return _PARSERS[hint](text)
    except ValueError:
        raise SkvError(f"'{text}' is not {_SPOKEN[hint]} ({where})") from None


def _parse_bool(text: str) -> bool:
    choices = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in choices:
        raise ValueError(text)
    return choices[text.lower()]


_PARSERS: dict[Any, Any] = {int: int, float: float, str: str, bool: _parse_bool}
_SPOKEN = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
