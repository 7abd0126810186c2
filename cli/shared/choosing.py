"""Which methods a command means: `-m` specifications, named sets, what all are given alike, and what cannot run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import methodcaller
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cli.shared.options import RunOptions
    from shadowkv.common.dims import Dims
    from shadowkv.contract.method import Method
    from shadowkv.models.resolving import ModelSource

# What a name with @ stands for; `all` is every method there is. Either way `_BESIDE` comes with its method.
METHOD_SETS = {
    "@paper": ("full", "shadowkv", "quest", "infinigen", "loki", "snapkv", "streaming"),
    "@retrieval": ("full", "oracle", "shadowkv", "quest", "infinigen", "loki"),
    "@eviction": ("full", "snapkv", "pyramidkv", "h2o", "tova", "streaming"),
}
# Settings that sets list beside a method's own. In 2 bits, KIVI's default, a small model answers little by its authors'
# code too, which says nothing about the method in 4.
_BESIDE = {"kivi": ("kivi:bits=4",)}
_DEFAULT = ("full", "shadowkv", "quest")


class Asked(NamedTuple):
    """A method as it was asked for. One that came out of a set may be given parameters that suit the model."""

    spec: str
    method: Method
    of_a_set: bool

    @property
    def given(self) -> set[str]:
        """Names of the parameters that were spelled out."""
        return set(re.findall(r"[:,]\s*(\w+)\s*=", self.spec))

    @property
    def beside(self) -> bool:
        """Whether a set lists it as one more setting of a method: not what the user spelled out."""
        return self.of_a_set and bool(self.given)


class Alike(NamedTuple):
    """What every method that can take it is given, such as a budget: the option as typed, and how to give it."""

    option: str
    give: Callable[[Method], Method | None]


@dataclass(frozen=True)
class Chosen:
    """Methods to run; labels of those that cannot run on this model, with the reason; those that took nothing."""

    methods: list[Method] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    untouched: list[str] = field(default_factory=list)


def parse_specs(specs: Sequence[str]) -> list[Asked]:
    """Every specification, with sets spelled out. Raises `SkvError` on what cannot be parsed."""
    from shadowkv.common.errors import SkvError
    from shadowkv.common.names import did_you_mean
    from shadowkv.contract.registry import methods, parse_method

    found: list[Asked] = []
    for spec in specs or _DEFAULT:
        if spec.startswith("@") and spec not in METHOD_SETS:
            known = ", ".join(METHOD_SETS)
            raise SkvError(f"unknown set of methods '{spec}'{did_you_mean(spec, METHOD_SETS)}; sets: all, {known}")
        members = tuple(methods()) if spec == "all" else METHOD_SETS.get(spec)
        listed = [setting for name in members or () for setting in (name, *_BESIDE.get(name, ()))]
        names = [(setting, True) for setting in listed] or [(spec, not specs)]
        found += [Asked(name, parse_method(name), of_a_set) for name, of_a_set in names]
    return found


def with_engine(asked: Sequence[Asked], engine: str | None) -> list[Asked]:
    """Every method that has an engine to choose, and none spelled out, with this one."""
    if engine is None:
        return list(asked)
    return [a if "engine" in a.given else a._replace(method=a.method.with_engine(engine)) for a in asked]


def parse_budgets(text: str | None) -> list[Alike]:
    """Read `256` or `256,512`: tokens that every method attends to in all. None for nothing."""
    from shadowkv.common.errors import SkvError

    items = _items(text)
    if not all(item.isdecimal() and int(item) > 0 for item in items):
        raise SkvError(f"'{text}' is not a budget; write tokens, such as 512 or 256,512")
    return [Alike(f"--budget {tokens}", methodcaller("with_budget", tokens)) for tokens in map(int, items)]


def parse_kv_bytes(text: str | None, dims: Dims, tokens: int) -> list[Alike]:
    """Read `64MiB` or `25%,50%` (of full attention): what a method holds on the device of a prompt of `tokens`."""
    from shadowkv.common.errors import SkvError
    from shadowkv.common.sizes import parse_bytes

    def count(item: str) -> int:
        share = re.fullmatch(r"(\d+(?:\.\d+)?)%", item)
        if share is None:
            return parse_bytes(item, "--kv-bytes")
        if not 0 < float(share[1]) <= 100:
            raise SkvError(f"--kv-bytes {item} is not in (0, 100] %")
        return int(float(share[1]) / 100 * dims.full_bytes_per_token * tokens)

    return [
        Alike(f"--kv-bytes {item}", methodcaller("with_kv_bytes", dims, tokens, count(item))) for item in _items(text)
    ]


def choose(
    asked: Sequence[Asked],
    alike: Sequence[Alike],
    source: ModelSource,
    dims: Dims,
    unsupported: Mapping[str, str] = MappingProxyType({}),
) -> Chosen:
    """The methods that these specifications mean on this model; some are known to be `unsupported`, and why.

    A method appears once per thing that all are given, or once if it can take none. A setting that a set lists beside
    another is the same row where an option decides what tells them apart. Raises `SkvError` if none can run.
    """
    from shadowkv.common.errors import SkvError

    chosen = Chosen(unsupported=dict(unsupported))
    for one in asked:
        method = _suggested(one.method, source, dims) if one.of_a_set else one.method
        for option, give in alike or [Alike("", lambda _: None)]:
            try:
                changed = give(method)
                setting = changed or method
                setting.check(dims)
            except SkvError as error:
                if not (one.beside and str(error) in chosen.unsupported.values()):
                    chosen.unsupported[f"{one.spec} at {option}" if option else one.spec] = str(error)
                continue
            own = sorted(k for k in one.given if setting.params().get(k) != method.params().get(k))
            if own and not one.beside:
                raise SkvError(f"{one.spec} has a {own[0]} of its own; give that or {option.partition(' ')[0]}")
            if setting not in chosen.methods:
                chosen.methods.append(setting)
                if option and changed is None:
                    chosen.untouched.append(setting.label)
    if not chosen.methods:
        raise SkvError(next(iter(chosen.unsupported.values())))
    return chosen


def untouched_note(chosen: Chosen, options: RunOptions) -> list[str]:
    """What tables must say where an option for all methods left some as they are."""
    option = "--budget" if options.kv_bytes is None else f"--kv-bytes {options.kv_bytes}"
    names = ", ".join(chosen.untouched)
    return [f"{option} does not apply to {names}, which run as they are"] if names else []


def tell_unsupported(unsupported: Mapping[str, str]) -> None:
    """Name on stderr what cannot run here, and why."""
    from shadowkv.common.wording import plain_line

    for label, reason in unsupported.items():
        print(f"skv: unsupported: {label}: {plain_line(reason)}", file=sys.stderr)


def _suggested(method: Method, source: ModelSource, dims: Dims) -> Method:
    """A method of a set, with the parameters suggested for the model in place of those of an 8B one."""
    wanted: dict[str, Any] = {}
    if source.preset and method.params().get("budget") and method.with_budget(source.preset.budget):
        wanted["budget"] = source.preset.budget
    if method.name == "shadowkv":
        wanted["rank"] = source.preset.rank if source.preset else min(method.params()["rank"], dims.width)
    changed: Any = method
    suggested: Method = replace(changed, **wanted)
    return suggested


def _items(text: str | None) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
