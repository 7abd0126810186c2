"""The geometry and sizes that `skv bench kernels` is asked for."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.shared.options import ModelOptions

if TYPE_CHECKING:
    from evals.bench.kernels.items import Item, Workload
    from evals.runs.manifest import Manifest
    from shadowkv.methods.shadowkv.method import ShadowKV


@dataclass(frozen=True)
class KernelSettings(ModelOptions):
    """Geometry and sizes."""

    model: Annotated[
        str, typer.Option(help="Whose geometry: preset, folder or Hub id; only its config is read, inputs are random.")
    ] = "llama3.1-8b"
    context: Annotated[str, typer.Option(help="Tokens of every row, k = 1024.")] = "122k"
    batch: Annotated[int, typer.Option(help="Rows.")] = 8
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help="Setting such as shadowkv:rank=160,budget=2048 (default: the preset's)."),
    ] = None
    only: Annotated[
        str | None, typer.Option(help="Kernels, in their own order: chunk_scores,attend_resident (default: all).")
    ] = None
    misses: Annotated[float, typer.Option(help="Share of the chosen chunks that a step has to fetch.")] = 0.4
    steps: Annotated[int, typer.Option(help="Times that every kernel is timed.")] = 50
    warmup: Annotated[int, typer.Option(help="Calls before those, which do not count.")] = 10
    compile_for: Annotated[
        str | None, typer.Option("--compile", help="Also compile for these GPUs, which need not be here: sm_80,sm_90.")
    ] = None
    out: Annotated[Path | None, typer.Option(help="Folder for run.json, kernels.jsonl and tables (summary.md).")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout and nothing else.")] = (
        False
    )
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be measured, and run nothing.")] = False


class AskedKernels:
    """Everything that can be known, and refused, before anything is computed."""

    def __init__(self, settings: KernelSettings) -> None:
        import torch

        from evals.bench.kernels.compilation import parse_targets
        from evals.common.lengths import parse_lengths
        from shadowkv.common.errors import SkvError
        from shadowkv.kernels.launch import check_head_dim
        from shadowkv.models.loading import load_config, pick_device, pick_dtype
        from shadowkv.models.model_size import model_size
        from shadowkv.models.resolving import resolve

        lengths = parse_lengths(settings.context, None, "--context")
        if len(lengths) > 1:
            raise SkvError(f"kernels are measured at one length: give one --context, not {settings.context}")
        self.settings, self.context = settings, lengths[0]
        self.targets = parse_targets(settings.compile_for) if settings.compile_for else ()
        self.device = pick_device(settings.device)
        self.dtype = pick_dtype(self.device, settings.dtype)
        self.on_gpu = self.device.startswith("cuda")
        self.source = resolve(settings.model, config_only=True, offline=settings.offline)
        config = load_config(self.source, trust_remote_code=settings.trust_remote_code)
        self.dims = model_size(
            config,
            getattr(torch, self.dtype).itemsize,
            device=self.device.partition(":")[0],
            trust_remote_code=settings.trust_remote_code,
        ).dims
        check_head_dim(self.dims.head_dim)
        self.method = self._method()
        self.asked = self._workload()
        self.work = self.asked if self.on_gpu else self.asked.shrunk()
        self.items = self._items()
        if self.on_gpu:
            self._check_host()

    def _method(self) -> ShadowKV:
        from shadowkv.common.errors import SkvError
        from shadowkv.contract.registry import parse_method
        from shadowkv.methods.shadowkv.method import ShadowKV

        preset = self.source.preset
        suggested = ShadowKV(rank=min(preset.rank, self.dims.width), budget=preset.budget) if preset else ShadowKV()
        spec = self.settings.method
        method = parse_method(spec) if spec else suggested
        if not isinstance(method, ShadowKV):
            raise SkvError(f"{spec}: kernels are shadowkv's; give -m shadowkv:rank=160,budget=2048")
        if method.energy:
            raise SkvError("kernels are measured at one rank: give rank instead of energy")
        method.check(self.dims)
        slots, landmarks = method.budget // method.chunk, method.landmarks(self.context)
        if landmarks < slots:
            raise SkvError(
                f"--context {self.settings.context} leaves {landmarks} chunks to choose from, and budget="
                f"{method.budget} chooses {slots}: give a longer context or a smaller budget"
            )
        return method

    def _workload(self) -> Workload:
        import torch

        from evals.bench.kernels.cases import Case
        from evals.bench.kernels.items import Workload
        from shadowkv.tensors.stored import CODINGS

        method, dims = self.method, self.dims
        slots = method.budget // method.chunk
        case = Case(
            batch=self.settings.batch,
            heads=dims.kv_heads,
            group=dims.q_heads // dims.kv_heads,
            head_dim=dims.head_dim,
            chunks=method.context_tokens(self.context) // method.chunk,
            slots=slots,
            chunk=method.chunk,
            rank=method.rank,
            dtype=getattr(torch, self.dtype),
            device=self.device,
        )
        # A coding that was asked for is the only one measured. In a bf16 run bf16 is what is native.
        values = (method.values,) if method.values != "native" else tuple(CODINGS)
        factors = (method.factors,) if method.factors != "native" else ("native", "int8")
        if case.dtype == torch.bfloat16:
            values = tuple(dict.fromkeys("native" if coding == "bf16" else coding for coding in values))
        misses = max(1, round(self.settings.misses * slots))  # of none there would be nothing to compare
        return Workload(case, method.regions, method.landmarks(self.context), misses, values, factors)

    def _check_host(self) -> None:
        """Refuse values that the host cannot pin. Torch rounds up to powers of two and keeps what it had."""
        from evals.bench.memory import size
        from shadowkv.common.errors import SkvError
        from shadowkv.tensors.host_memory import available_host_bytes

        case = self.work.case
        need = 3 * case.batch * case.tokens * case.width * case.dtype.itemsize
        if need > available_host_bytes():
            free = size(available_host_bytes())
            raise SkvError(
                f"pinning values takes up to {size(need)} of host memory, {free} are free: a smaller --batch"
            )

    def _items(self) -> list[Item]:
        """All kernels, or those of --only, and what is measured with them."""
        from evals.bench.kernels.subjects import items
        from shadowkv.common.errors import SkvError
        from shadowkv.common.names import did_you_mean
        from shadowkv.kernels import twins

        found = list(items(self.work, twins))
        if self.settings.only is None:
            return found
        asked = [name.strip() for name in self.settings.only.split(",") if name.strip()]
        known = list(dict.fromkeys(item.kernel for item in found))
        for name in asked:
            if name not in known:
                raise SkvError(f"unknown kernel '{name}'{did_you_mean(name, known)}; one of {', '.join(known)}")
        if not asked:
            raise SkvError(f"--only names no kernel; one of {', '.join(known)}")
        return [item for item in found if item.kernel in asked]

    @property
    def sizes(self) -> dict[str, Any]:
        """What is measured, on a CPU less than was asked for. Slots are chunks."""
        work = self.work
        of_case = {key: value for key, value in asdict(work.case).items() if key not in ("dtype", "device")}
        return {
            **of_case,
            "values": list(work.values),
            "factors": list(work.factors),
            "landmarks": work.landmarks,
            "misses": work.misses,
            "outlier_tokens": work.regions.outliers,
            "ring_tokens": work.regions.ring,
        }

    @property
    def notes(self) -> list[str]:
        """What every table must say."""
        case = self.work.case
        said = (
            f"random inputs in {self.source.name}'s geometry, no model: batch {case.batch}, {case.tokens} tokens, "
            f"{case.heads} KV heads x group {case.group} x {case.head_dim}, {case.slots} slots of {case.chunk}, "
            f"rank {case.rank}, {self.work.misses} misses per head"
        )
        cpu = (
            f"checked on a CPU in Triton's interpreter at small sizes; asked for: batch {self.asked.case.batch}, "
            f"{self.context} tokens, {self.asked.case.heads} KV heads, {self.asked.case.slots} slots; times need a GPU"
        )
        return [said] if self.on_gpu else [said, cpu]

    @property
    def machine(self) -> str:
        """The part of this machine that times depend on."""
        from evals.bench.conditions import machine_name
        from evals.runs.manifest import this_session

        return machine_name(this_session([], self.device).machine)

    @cached_property
    def manifest(self) -> Manifest:
        """run.json of this command."""
        from evals.runs.manifest import Manifest, plain, this_session

        return Manifest(
            benchmark="kernels",
            config={
                **self.sizes,
                "steps": self.settings.steps,
                "warmup_steps": self.settings.warmup,
                "synthetic_kv": True,
                "machine": self.machine,
            },
            methods={self.method.label: plain(self.method.params())},
            selection={
                "compile": list(self.targets),
                "context": self.context,
                "batch": self.settings.batch,
                "only": self.settings.only,
            },
            model={
                "name": f"{self.source.name} geometry",
                "source": self.source.described,
                "weights_sha256": None,
                "dummy": False,
                "dtype": self.dtype,
                "device": self.device,
            },
            sources={},
            notes=self.notes,
            sessions=[this_session(["skv", *sys.argv[1:]], self.device)],
        )
