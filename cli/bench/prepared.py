"""What both benchmarks of speed share: settings, checks before anything heavy, and what they need to run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.bench.options import BenchSettings, check, default_contexts
from cli.shared.asked import AskedModel
from cli.shared.which_model import with_model

if TYPE_CHECKING:
    from evals.bench.engines import Contender
    from evals.bench.measuring import Bench
    from evals.bench.memory import Room
    from evals.bench.prompts import Prompts
    from evals.common.sources import Haystack
    from evals.runs.manifest import Manifest
    from shadowkv.contract.method import Method
    from shadowkv.engine.engine import Engine
    from shadowkv.models.loading import LoadedModel


class Prepared(AskedModel):
    """Everything that can be known, and refused, before weights are loaded."""

    def __init__(self, settings: BenchSettings) -> None:
        from cli.shared.calibrations import on_calibrations
        from cli.shared.choosing import choose, parse_budgets, parse_kv_bytes, parse_specs
        from evals.common.lengths import parse_lengths
        from shadowkv.common.sizes import parse_bytes

        specs, alike = parse_specs(settings.methods or ()), parse_budgets(settings.budget)
        check(settings)
        settings = with_model(settings)
        super().__init__(settings, dummy=settings.dummy)
        self.size.require_served()
        self.settings = settings
        self.engines = tuple(dict.fromkeys(settings.engine or ()))
        self.cap_bytes = None if settings.memory_cap is None else parse_bytes(settings.memory_cap, "--memory-cap")
        asked = settings.context
        if asked == "auto":
            asked = default_contexts(self.device, self.context_tokens)
        self.contexts = tuple(sorted(parse_lengths(asked, self.context_tokens, "--context")))
        if settings.kv_bytes is not None:
            alike = parse_kv_bytes(settings.kv_bytes, self.dims, max(self.contexts))
        specs, uncalibrated = on_calibrations(specs, self, settings, make=not settings.dry_run)
        self.chosen = choose(specs, alike, self.source, self.dims, uncalibrated)
        self.methods, self.unsupported = self.chosen.methods, self.chosen.unsupported
        if settings.synthetic_kv:
            self._refuse_made_up_keys({_name(asked.method) for asked in specs if not asked.of_a_set})

    def _refuse_made_up_keys(self, named: set[str]) -> None:
        """Methods whose cost depends on the prompt: an error where named, left out where a set brought them."""
        from shadowkv.common.errors import SkvError

        for method in [m for m in self.methods if m.cost_follows_text]:
            reason = "what it reads follows the prompt's hidden states, which --synthetic-kv does not have"
            if _name(method) in named or len(self.methods) == 1:
                raise SkvError(f"{method.label}: {reason}; leave out the method or --synthetic-kv")
            self.unsupported[method.label] = reason
            self.methods.remove(method)

    @cached_property
    def haystack(self) -> Haystack:
        """The text that prompts are cut from."""
        from cli.shared.fetching import fetch_missing
        from evals.common.sources import haystack

        settings, spec = self.settings, self.settings.haystack
        if spec == "auto":
            spec = "essays" if self._has_essays() else "synthetic"
        elif spec == "essays":
            fetch_missing(["essays"], offline=settings.offline, silent=settings.silent)
        return haystack(spec)

    def _has_essays(self) -> bool:
        """Whether the essays are here, or can be fetched now; a sweep does without them, and says so."""
        from cli.shared.fetching import fetch_missing
        from cli.shared.render import say
        from shadowkv.common.errors import SkvError

        try:
            fetch_missing(["essays"], offline=self.settings.offline, silent=self.settings.silent)
        except SkvError as error:
            if not self.settings.silent:
                say(f"prompts are synthetic: {error}")
            return False
        return True

    @cached_property
    def room(self) -> Room:
        """The memory there is."""
        import torch

        from evals.bench.memory import Room, size
        from shadowkv.common.errors import SkvError

        weights = self.size.weight_bytes
        if self.cap_bytes is not None and self.cap_bytes < weights:
            raise SkvError(f"--memory-cap {self.settings.memory_cap} is less than the weights, {size(weights)}")
        return Room(
            torch.device(self.device),
            self.size,
            self.cap_bytes,
            computes_prompts=not self.settings.synthetic_kv,
            records_queries=self.records_queries,
        )

    @property
    def records_queries(self) -> bool:
        """Whether any method needs all queries of a prompt."""
        return any(method.needs_prompt_queries for method in self.methods)


def _name(method: Method) -> str:
    """What it is called, without its parameters."""
    return method.label.partition(":")[0]


@dataclass(frozen=True)
class Loaded:
    """A model with everything that measures it."""

    ready: Prepared
    model: LoadedModel
    engine: Engine
    bench: Bench
    contenders: list[Contender]


def load(ready: Prepared, *, graphs: bool = True, hits: float | None = None) -> Loaded:
    """Load the weights and line up what is measured. See `Engine` for graphs, and `Bench` for hits."""
    from evals.bench.conditions import machine_name
    from evals.bench.engines import ENGINES, SkvContender
    from evals.bench.measuring import STEPS_OF_HITS, Bench
    from evals.bench.prompts import RealPrompts, SyntheticPrompts, warm_up
    from evals.bench.vllm_engine import VllmContender
    from evals.runs.manifest import this_session
    from shadowkv.engine.engine import Engine
    from shadowkv.models.calibrated import check_weights

    settings = ready.settings
    text = None if settings.synthetic_kv else ready.haystack.text
    model = ready.load()
    engine = Engine(
        model.model,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        reuse_prefix=False,  # rows are distinct, and a measured prefill is a whole one
        record_queries=ready.records_queries,
        graphs=graphs,
    )
    for method in ready.methods:
        method.check(engine.dims)
        check_weights(method, model)
    for context in ready.contexts:
        engine.rope.check_span(context, settings.warmup + settings.steps + max(STEPS_OF_HITS, settings.steps + 1))
    ready.room.hold_cap()
    prompts: Prompts = (
        SyntheticPrompts(engine, settings.seed, with_queries=ready.records_queries)
        if text is None
        else RealPrompts(engine, model.tokenizer, text, settings.seed)
    )
    contenders: list[Contender] = [SkvContender(engine, prompts, method) for method in ready.methods]
    for name in ready.engines:
        if name in ENGINES:
            contenders.append(ENGINES[name](engine, prompts))
        else:
            folder = str(ready.source.folder)
            contenders.append(VllmContender(folder, ready.dtype, ready.dims, prompts, model.model.device))
    warm_up(engine)
    machine = machine_name(this_session([], model.device).machine)
    bench = Bench(engine, ready.room, machine, settings.warmup, settings.steps, hits)
    return Loaded(ready, model, engine, bench, contenders)


def manifest_of(loaded: Loaded, benchmark: str, selection: dict[str, Any]) -> Manifest:
    """run.json of a benchmark of speed: the machine is part of what must stay the same."""
    from cli.shared.choosing import untouched_note
    from evals.bench.vllm_engine import UNTESTED
    from evals.runs.manifest import (
        Manifest,
        described,
        method_notes,
        model_entry,
        plain,
        session_of,
        unchecked_note,
        weight_notes,
    )

    ready, model = loaded.ready, loaded.model
    settings = ready.settings
    notes = []
    if settings.dummy:
        notes.append("dummy weights: the text means nothing, only times and bytes do")
    notes += weight_notes(model_entry(model))
    if settings.synthetic_kv:
        notes.append(
            "synthetic KV: random keys and values, no prefill; what depends on text is not that of text; ShadowKV's "
            "factors are on random directions, and building them leaves out the fit"
        )
    if loaded.bench.hits is not None:
        notes.append(
            f"hits made: {loaded.bench.hits:.0%} of the chunks that a step chooses are said to be there (--hits), "
            "whichever they are; what a text would find there was not measured"
        )
    if ready.cap_bytes is not None:
        how = "as planned, not as allocated" if ready.device == "cpu" else "by torch's allocator"
        notes.append(f"device memory capped at {settings.memory_cap}, {how}")
    if "vllm" in ready.engines:
        notes.append(UNTESTED)
    notes += method_notes(ready.methods)
    notes += [f"unsupported: {label}: {why}" for label, why in ready.unsupported.items()]
    notes += untouched_note(ready.chosen, settings)
    sources = {}
    if not settings.synthetic_kv:
        text = ready.haystack
        sources = {"haystack": {"name": text.name, "version": text.version, "sha256": text.sha256}}
    session = session_of(model)
    return Manifest(
        benchmark=benchmark,
        config={
            "prefill_chunk_tokens": loaded.engine.prefill_chunk_tokens,
            "steps": settings.steps,
            "warmup_steps": settings.warmup,
            "synthetic_kv": settings.synthetic_kv,
            "memory_cap_bytes": ready.cap_bytes,
            **({} if loaded.bench.hits is None else {"hits": loaded.bench.hits}),
            "seed": settings.seed,
            "machine": loaded.bench.machine,
        },
        methods={
            **{m.label: plain(described(m)) for m in ready.methods},
            **{f"full@{name}": {} for name in ready.engines},
        },
        selection=plain(selection),
        model=model_entry(model),
        sources=sources,
        notes=[*notes, *unchecked_note(session)],
        sessions=[session],
    )


def folder_for(manifest: Manifest, settings: BenchSettings) -> tuple[Path, Manifest]:
    """Where a run goes, and its manifest: of another machine's folder only with --force."""
    from dataclasses import replace

    from evals.runs.manifest import Manifest as Kept
    from shadowkv.common.errors import SkvError

    path = settings.out or Path("results") / manifest.folder_name
    if not (path / "run.json").is_file():
        return path, manifest
    theirs = Kept.read(path / "run.json").config.get("machine")
    mine = manifest.config["machine"]
    if theirs in (None, mine):
        return path, manifest
    if not settings.force:
        raise SkvError(
            f"{path} holds times of another machine ({theirs}), this one is {mine}: choose another --out, or --force"
        )
    return path, replace(manifest, config={**manifest.config, "machine": theirs})
