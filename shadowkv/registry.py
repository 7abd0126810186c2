"""Names of methods: found by being in `shadowkv/methods/`, parsed from `name:key=value,key=value`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
from dataclasses import fields
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from shadowkv.errors import SkvError
from shadowkv.method import Method
from shadowkv.names import did_you_mean


@cache
def methods() -> dict[str, type[Method]]:
    """Every concrete `Method` defined in a module of `shadowkv.methods`, by name."""
    package = importlib.import_module("shadowkv.methods")
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Method) and cls.__module__ == module.__name__ and not inspect.isabstract(cls):
                found[cls.name] = cls
    return dict(sorted(found.items(), key=lambda item: (item[0] != "full", item[0])))


def parse_method(spec: str) -> Method:
    """Read `"shadowkv:rank=64,budget=256"`; raises `SkvError` on an unknown name, key or value."""
    name, _, listed = spec.strip().partition(":")
    known = methods()
    if name not in known:
        raise SkvError(f"unknown method '{name}'{did_you_mean(name, known)}; methods: {', '.join(known)}")
    cls = known[name]
    types_by_key = get_type_hints(cls)
    keys = [f.name for f in fields(cls)]
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in listed.split(","))):
        key, equals, text = (part.strip() for part in item.partition("="))
        valid = f"parameters of {name}: {', '.join(keys) or 'none'}"
        if key not in keys:
            raise SkvError(f"unknown parameter '{key}' of method {name}{did_you_mean(key, keys)}; {valid}")
        if not equals or not text:
            raise SkvError(f"'{item}' of method {name} is not of the form key=value; {valid}")
        if key in values:
            raise SkvError(f"parameter '{key}' of method {name} is given twice")
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
