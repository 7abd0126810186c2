"""Which methods a command means: `-m` specifications, named sets, one budget for all, and what cannot run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from shadowkv.method import Dims, Method
    from shadowkv.resolving import ModelSource

# What a name with @ stands for; `all` is every method there is.
METHOD_SETS = {
    "@paper": ("full", "shadowkv", "quest", "infinigen", "loki", "snapkv", "streaming"),
    "@retrieval": ("full", "oracle", "shadowkv", "quest", "infinigen", "loki"),
    "@eviction": ("full", "snapkv", "pyramidkv", "h2o", "tova", "streaming"),
}
_DEFAULT = ("full", "shadowkv", "quest")


class Chosen(NamedTuple):
    """Methods to run, and the labels of those that cannot run on this model, with the reason."""

    methods: list[Method]
    unsupported: dict[str, str]


def parse_specs(specs: Sequence[str]) -> list[tuple[str, bool]]:
    """Every specification with sets spelled out, and whether it is a set's (so that parameters may be suggested).

    Raises `SkvError` on what cannot be parsed.
    """
    from shadowkv.errors import SkvError
    from shadowkv.names import did_you_mean
    from shadowkv.registry import methods, parse_method

    found: list[tuple[str, bool]] = []
    for spec in specs or _DEFAULT:
        if spec.startswith("@") and spec not in METHOD_SETS:
            known = ", ".join(METHOD_SETS)
            raise SkvError(f"unknown set of methods '{spec}'{did_you_mean(spec, METHOD_SETS)}; sets: all, {known}")
        members = tuple(methods()) if spec == "all" else METHOD_SETS.get(spec)
        found += [(member, True) for member in members] if members else [(spec, not specs)]
    for spec, _ in found:
        parse_method(spec)
    return found


def parse_budgets(text: str | None) -> list[int]:
    """Read `256` or `256,512`; none for no common budget."""
    from shadowkv.errors import SkvError

    items = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(item.isdecimal() and int(item) > 0 for item in items):
        raise SkvError(f"'{text}' is not a budget; write tokens, such as 512 or 256,512")
    return list(dict.fromkeys(map(int, items)))


def choose(specs: Sequence[tuple[str, bool]], budgets: Sequence[int], source: ModelSource, dims: Dims) -> Chosen:
    """The methods that these specifications mean on this model.

    A method that chooses what to attend to appears once per budget, the others once. Raises `SkvError` if none can run.
    """
    from shadowkv.errors import SkvError
    from shadowkv.registry import parse_method

    asked: dict[Method, None] = {}
    unsupported: dict[str, str] = {}
    for spec, ours in specs:
        method = parse_method(spec)
        if ours:
            method = _suggested(method, source, dims)
        elif budgets and "budget=" in spec:
            raise SkvError(f"{spec} has a budget of its own; give that or --budget")
        for budget in budgets or [None]:
            try:
                setting = method if budget is None else method.with_budget(budget) or method
                setting.check(dims)
            except SkvError as error:
                unsupported[spec if budget is None else f"{spec} at --budget {budget}"] = str(error)
            else:
                asked[setting] = None
    if not asked:
        raise SkvError(next(iter(unsupported.values())))
    return Chosen(list(asked), unsupported)


def _suggested(method: Method, source: ModelSource, dims: Dims) -> Method:
    """A method of a set, with the parameters suggested for the model in place of those of an 8B one."""
    wanted: dict[str, Any] = {}
    if method.params().get("budget") is not None:
        wanted["budget"] = source.preset.budget if source.preset else 2048
    if method.name == "shadowkv":
        wanted["rank"] = source.preset.rank if source.preset else min(160, dims.width)
    changed: Any = method
    suggested: Method = replace(changed, **wanted)
    return suggested
