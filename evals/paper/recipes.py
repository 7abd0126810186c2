"""Each experiment as the commands that run it, at the paper's scale and at one that a laptop finishes.

Source: arXiv 2410.21465 and its repository (bytedance/ShadowKV a21f5a9): models, contexts, budgets, ranks and samples.
What the paper ablates is the sparse budget, the chunk size, the rank and the outliers; the values are ours where it
does not say them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from evals.paper.published import ROWS
from evals.tables.table import tokens
from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean

SCALES = ("smoke", "full")
SMOKE_MODEL = "smollm2-135m"
MODELS = ("llama3-8b-1m", "llama3.1-8b", "glm4-9b-1m", "yi-9b-200k", "phi3-mini-128k", "qwen2-7b-128k")
_FULL_METHODS = (
    "full",
    "shadowkv:budget=2048,rank=160",
    "quest:budget=2048",
    "infinigen:budget=2048",
    "loki:budget=2048",
)
_SMOKE_METHODS = (
    "full",
    "shadowkv:budget=256,rank=64",
    "quest:budget=256",
    "infinigen:budget=256",
    "loki:budget=256",
)
# Of ShadowKV, by scale: the setting that everything is compared with, and what is changed in it, one at a time.
ABLATION_BASE = {"full": "shadowkv:budget=2048,rank=160", "smoke": "shadowkv:budget=256,rank=64"}
_ABLATED: dict[str, dict[str, Sequence[int]]] = {
    "full": {
        "budget": (256, 512, 1024, 4096),
        "chunk": (4, 16, 32),
        "rank": (32, 64, 96, 128, 256),
        "outliers": (0, 8, 24, 96),
    },
    "smoke": {"budget": (64, 128, 512), "chunk": (4, 16, 32), "rank": (16, 32, 128), "outliers": (0, 24, 48)},
}


@dataclass(frozen=True)
class Step:
    """One `skv` command, without its `--out`."""

    folder: str  # name of its run folder within the recipe's
    words: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """One experiment; `steps` are made for a scale and the models asked for. `summary` is of the full scale."""

    name: str
    summary: str
    steps: Callable[[str, Sequence[str]], list[Step]]
    needs: tuple[str, ...] = ()  # packs, beside the model's


def recipes() -> Mapping[str, Recipe]:
    """Every recipe by name."""
    return _RECIPES


def find_recipe(name: str) -> Recipe:
    """A recipe by its name; raises `SkvError` with the nearest one otherwise."""
    if name not in _RECIPES:
        raise SkvError(f"unknown experiment '{name}'{did_you_mean(name, _RECIPES)}; one of {', '.join(_RECIPES)}")
    return _RECIPES[name]


def _throughput(scale: str, models: Sequence[str]) -> list[Step]:
    if scale == "smoke":
        made = _words("bench throughput", context="1k,2k", batch="1,2,4", repeats="2", steps="16")
        return [_step(model, made, _SMOKE_METHODS[:3], model) for model in models]
    # The published batches are what an 80 GB card holds, so a larger one is held to that.
    made = _words("bench throughput", steps="100", memory_cap="80GB", haystack="auto")
    return [
        _step(
            f"{model}-{tokens(context)}",
            (*made, "--find-max-batch", "--context", tokens(context)),
            ("full", f"shadowkv:budget={budget},rank=160", f"quest:budget={budget}"),
            model,
        )
        for model in models
        for context, budget in _sizes(model)
    ]


def _sizes(model: str) -> list[tuple[int, int]]:
    """Contexts and budgets that were published for a model, or those of the others within its context."""
    own = [(row.context, row.budget) for row in ROWS if row.model == model]
    return own or sorted({(row.context, row.budget) for row in ROWS if row.context < 128 * 1024})


def _ruler(scale: str, models: Sequence[str]) -> list[Step]:
    if scale == "smoke":
        tasks = "niah_single_1,niah_multikey_1,niah_multivalue,vt,qa_1"
        made = _words("eval ruler", profile="shadowkv", lengths="1k", samples="2", tasks=tasks)
        return [_step(model, made, _SMOKE_METHODS, model) for model in models]
    made = _words("eval ruler", profile="shadowkv", lengths="128k", samples="96")
    sparse = "shadowkv:budget=2048,rank=160+minference"
    return [_step(model, made, (*_FULL_METHODS, sparse), model) for model in models]


def _niah(scale: str, models: Sequence[str]) -> list[Step]:
    if scale == "smoke":
        grid = _words("eval niah", lengths="1k,2k", depths="3")
        turns = _words("eval niah", lengths="2k", depths="2", turns="3")
        methods: tuple[str, ...] = _SMOKE_METHODS[:2]
    else:
        grid = _words("eval niah", depths="10")
        turns = _words("eval niah", lengths="64k", depths="10", turns="4")
        methods = _FULL_METHODS[:2]
    forgetful = ("snapkv:budget=256", "streaming:budget=256") if scale == "smoke" else ("snapkv", "streaming")
    made = []
    for model in models:
        lengths = () if scale == "smoke" else ("--lengths", _doubling(model))
        made.append(_step(f"{model}-grid", (*grid, *lengths), methods, model))
        made.append(_step(f"{model}-turns", turns, (*methods, *forgetful), model))
    return made


def _doubling(model: str) -> str:
    """16k, 32k, ... up to the model's context."""
    from shadowkv.models.presets import presets

    known = presets().get(model)
    most = 128 * 1024 if known is None else known.context_tokens
    return ",".join(f"{k}k" for k in (16, 32, 64, 128, 256, 512, 1024) if k * 1024 <= most)


def _longbench(scale: str, models: Sequence[str]) -> list[Step]:
    if scale == "smoke":
        # All tasks, of which those without rows are left out and named.
        made = _words("eval longbench", samples="1", max_prompt_tokens="2000")
        return [_step(model, made, _SMOKE_METHODS[:3], model) for model in models]
    made = _words("eval longbench", min_tokens="4096", samples="500")  # of no task are there more
    return [_step(model, made, _FULL_METHODS, model) for model in models]


def _ablations(scale: str, models: Sequence[str]) -> list[Step]:
    if scale == "smoke":
        made = _words("eval niah", lengths="2k", depths="10")
    else:
        made = _words("eval ruler", profile="shadowkv", lengths="128k", samples="24")
    base = ABLATION_BASE[scale]
    return [_step(model, made, ("full", base, *_changed(base, _ABLATED[scale])), model) for model in models]


def _changed(base: str, ablated: Mapping[str, Sequence[int]]) -> list[str]:
    """The base with one parameter set to another value."""
    from shadowkv.contract.registry import parse_method

    params = parse_method(base).params()
    spelled = {key: params[key] for key in ("budget", "rank")}
    return [
        "shadowkv:" + ",".join(f"{k}={v}" for k, v in {**spelled, key: value}.items())
        for key, values in ablated.items()
        for value in values
    ]


def _words(command: str, **options: str) -> tuple[str, ...]:
    spelled = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
    return (*command.split(), *(word for pair in spelled for word in pair))


def _step(folder: str, words: Sequence[str], methods: Sequence[str], model: str) -> Step:
    listed = [word for method in methods for word in ("-m", method)]
    return Step(folder.replace("/", "--"), (*words, "--model", model, *listed))


_RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("throughput", "decode throughput at the largest batch, beside the published table", _throughput),
            Recipe("ruler", "RULER at 128K: eleven tasks, 96 samples, the paper's peers", _ruler, ("ruler",)),
            Recipe("niah", "needle in a haystack up to the model's length, and over several turns", _niah, ("essays",)),
            Recipe("longbench", "LongBench on prompts of at least 4K tokens", _longbench, ("longbench",)),
            Recipe(
                "ablations", "ShadowKV's budget, chunk size, rank and outliers, one at a time", _ablations, ("essays",)
            ),
        )
    }
)
