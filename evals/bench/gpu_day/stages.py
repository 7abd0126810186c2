"""The stages of a day on a GPU, in order of value: what each is for, needs, runs and writes.

Commands are written as they would be typed. In braces: `{out}`, the stage's folder; `{model}`, whose weights are here,
with its `{rank}` and `{budget}` and a `{long}` context; `{tests}`, the folder of tests; `{tiny}` and `{tiny4}`, random
models of a few kB, with two and with four KV heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from evals.bench.gpu_day.agreement import engines_agree
from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean

MOST_SECONDS = 480
_RUN = ("greenlet", "platformdirs", "pandas", "matplotlib")  # what a run and its tables import
_LLAMA = "--device cuda --model llama3.1-8b --dummy --synthetic-kv"
_TINY = "--device cpu --model {tiny} --steps 2 --warmup 1 -m full -m shadowkv:rank=8,budget=64,engine=fast"
_TINY_KERNELS = "--device cpu --context 4k --batch 1 -m shadowkv:values=int8,factors=int8"
_GPU_TESTS = "pytest {tests} -m gpu -o addopts=--strict-markers -p no:cacheprovider -ra --continue-on-collection-errors"


@dataclass(frozen=True)
class Stage:
    """One stage. What it needs beside a GPU is said by `modules`, `weights` and `packs`."""

    name: str
    purpose: str
    commands: tuple[str, ...]
    tiny: tuple[str, ...]  # the smallest form, on a CPU; none where only a GPU has what the stage is for
    writes: str
    on_failure: str
    modules: tuple[str, ...] = ()
    weights: bool = False
    packs: tuple[str, ...] = ()
    check: Callable[[Path], tuple[bool, str]] | None = None  # of the folder, after all commands

    @property
    def takes_tiny_models(self) -> bool:
        """Whether its smallest form runs a model."""
        return any("{tiny" in command for command in self.tiny)

    @property
    def needs(self) -> str:
        """As a table says it."""
        return ", ".join(["CUDA", *["weights"] * self.weights, *self.packs])

    def filled(self, values: Mapping[str, str], *, tiny: bool) -> list[list[str]]:
        """Its commands as words, braces filled in word by word, so that a path may hold spaces."""
        import shlex

        return [[word.format_map(values) for word in shlex.split(c)] for c in (self.tiny if tiny else self.commands)]


def stages() -> Mapping[str, Stage]:
    """Every stage by name, in order."""
    return _STAGES


def choose(only: str | None) -> Sequence[Stage]:
    """The stages of `--only a,b`, in their own order; raises `SkvError` on an unknown name."""
    if only is None:
        return tuple(_STAGES.values())
    asked = [name.strip() for name in only.split(",") if name.strip()]
    for name in asked:
        if name not in _STAGES:
            raise SkvError(f"unknown stage '{name}'{did_you_mean(name, _STAGES)}; one of {', '.join(_STAGES)}")
    if not asked:
        raise SkvError(f"--only names no stage; one of {', '.join(_STAGES)}")
    return [stage for stage in _STAGES.values() if stage.name in asked]


_STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        stage.name: stage
        for stage in (
            Stage(
                "probe",
                "what this machine can do: pinned memory read by a kernel, a graph with a side stream, rates",
                ("skv bench gpu-day --probe {out}/probe.json",),
                ("skv bench gpu-day --probe {out}/probe.json --tiny",),
                "probe.json",
                "each finding stands by itself: what failed names the part of the engine that cannot work here",
            ),
            Stage(
                "tests",
                "kernels, graphs and pinned memory work at all",
                (
                    f"{_GPU_TESTS} -k 'not times_everything' --junitxml {{out}}/tests.xml",
                    f"{_GPU_TESTS} -k times_everything --junitxml {{out}}/tests-timing.xml",
                ),
                (),
                "tests.xml, tests-timing.xml",
                "stop here and mend: no number of the later stages means anything where a test of a kernel fails",
                ("pytest", "greenlet", "platformdirs", "triton"),
            ),
            Stage(
                "kernels",
                "every kernel against its twin, and its share of what the card can do",
                (
                    "skv bench kernels --device cuda --model llama3.1-8b --context 122k --batch 8 --steps 30 "
                    "--out {out}/run",
                ),
                (f"skv bench kernels --model llama3.1-8b {_TINY_KERNELS} --out {{out}}/run",),
                "a run folder: kernels.jsonl, summary.md",
                "a kernel that differs gets no time: run it at its sizes in the interpreter (tests/test_kernels.py)",
                ("triton", "platformdirs", "pandas"),
            ),
            Stage(
                "correct",
                "the fast engines answer as the references do, on real prompts of a real model",
                (
                    "skv eval niah --device cuda --model {model} --haystack essays --lengths {long} --depths 5 "
                    "--max-new-tokens 32 -m full:engine=reference -m full:engine=fast "
                    "-m shadowkv:rank={rank},budget={budget},engine=reference "
                    "-m shadowkv:rank={rank},budget={budget},engine=fast "
                    "-m quest:budget={budget},engine=reference -m quest:budget={budget},engine=fast "
                    "-m full:kv=fp8,engine=reference -m full:kv=fp8,engine=fast --out {out}/run",
                ),
                (
                    "skv eval niah --device cpu --model {tiny} --haystack synthetic --lengths 512 --depths 2 "
                    "--max-new-tokens 4 -m full:engine=reference -m full:engine=fast "
                    "-m shadowkv:rank=8,budget=64,engine=reference -m shadowkv:rank=8,budget=64,engine=fast "
                    "--out {out}/run",
                ),
                "a run folder: samples.jsonl with every answer",
                "speeds of a method whose engines disagree are not to be shown: find the first token that differs in "
                "samples.jsonl",
                (*_RUN, "triton"),
                weights=True,
                packs=("essays",),
                check=engines_agree,
            ),
            Stage(
                "throughput",
                "tokens per second at 122K and 32K in Llama-3.1-8B's geometry, random weights and keys",
                (
                    f"skv bench throughput {_LLAMA} --context 122k --batch 4 --repeats 2 --steps 48 "
                    "-m full -m full:kv=fp8 -m shadowkv --out {out}/122k",
                    f"skv bench throughput {_LLAMA} --context 32k --batch 4,16 --repeats 2 --steps 48 "
                    "-m full -m full:kv=fp8 -m shadowkv --out {out}/32k",
                    f"skv bench throughput {_LLAMA} --context 122k --batch 14 --repeats 1 --steps 160 "
                    "-m shadowkv -m shadowkv:values=int8 --out {out}/122k-large",
                    f"skv bench throughput {_LLAMA} --context 122k --batch 8,16 --repeats 1 --steps 48 "
                    "-m shadowkv:offload=none,values=int8 --out {out}/122k-on-device",
                ),
                (
                    f"skv bench throughput {_TINY} --dummy --synthetic-kv --context 256,512 --batch 1 --repeats 1 "
                    "--out {out}/tiny",
                ),
                "run folders: throughput.jsonl, summary.md, plots",
                "a batch that does not fit is no failure but recorded as oom; of errors the log has the lines",
                (*_RUN, "triton"),
            ),
            Stage(
                "latency",
                "where a decode step's time goes, by part, with a trace for Perfetto",
                (
                    f"skv bench latency {_LLAMA} --context 122k --batch 4 --steps 8 -m shadowkv "
                    "--trace {out}/shadowkv.json --out {out}/shadowkv",
                    f"skv bench latency {_LLAMA} --context 122k --batch 4 --steps 8 -m full "
                    "--trace {out}/full.json --out {out}/full",
                ),
                (
                    f"skv bench latency {_TINY.replace(' -m full', '')} --dummy --synthetic-kv --context 256 "
                    "--trace {out}/shadowkv.json --out {out}/shadowkv",
                ),
                "run folders: latency.jsonl, summary.md; shadowkv.json, full.json",
                "speeds above stand without it; in a container the profiler may lack the right to count",
                (*_RUN, "triton"),
            ),
            Stage(
                "hits",
                "how many chosen chunks are there already, on real text: what random keys cannot say",
                (
                    "skv bench throughput --device cuda --model {model} --haystack essays --context {long} --batch 4 "
                    "--repeats 1 --steps 48 -m full -m shadowkv:rank={rank},budget={budget},engine=fast "
                    "-m shadowkv:rank={rank},budget={budget},engine=fast,values=int8 --out {out}/run",
                ),
                (
                    f"skv bench throughput {_TINY} --haystack synthetic --context 512 --batch 1 --repeats 1 "
                    "--out {out}/run",
                ),
                "a run folder: hit rates stand in throughput.jsonl and summary.md",
                "without it the plan's 40 % of misses stay an assumption",
                (*_RUN, "triton"),
                weights=True,
                packs=("essays",),
            ),
            Stage(
                "geometries",
                "other shapes: 4 KV heads in groups of 8 and of 7, rotary embedding of half the channels",
                (
                    "skv bench kernels --device cuda --model yi-9b-200k --context 60k --batch 8 --steps 10 "
                    "--out {out}/kernels-yi",
                    "skv bench throughput --device cuda --model glm4-9b-1m --dummy --synthetic-kv --context 60k "
                    "--batch 4 --repeats 1 --steps 32 -m full -m shadowkv --out {out}/glm4",
                    "skv bench throughput --device cuda --model qwen2-7b-128k --dummy --synthetic-kv --context 60k "
                    "--batch 4 --repeats 1 --steps 32 -m full -m shadowkv --out {out}/qwen2",
                ),
                (
                    f"skv bench throughput {_TINY.replace('{tiny}', '{tiny4}')} --dummy --synthetic-kv --context 256 "
                    "--batch 1 --repeats 1 --out {out}/tiny",
                ),
                "run folders: kernels.jsonl, throughput.jsonl, summary.md",
                "Llama-3.1-8B's numbers stand; the geometry that fails is named by its folder",
                (*_RUN, "triton"),
            ),
        )
    }
)
