"""`skv doctor`: what is here, and what each missing thing would bring."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from types import MappingProxyType
from typing import Annotated, Any

import typer

EPILOG = "Examples:  skv doctor  ·  skv doctor --json"
_SHOWN = ("torch", "transformers", "greenlet")  # of the required packages; the others are only counted
# Optional package -> what it brings, and the command that gets it.
_OPTIONAL = MappingProxyType(
    {
        "triton": ("the fast engine on a GPU; skv bench kernels", "pip install 'skv[gpu]'"),
        "jieba": ("LongBench's Chinese tasks", "pip install 'skv[zh]'"),
        "peft": ("models with LoRA adapters", "pip install 'skv[adapters]'"),
        "flashinfer-python": ("its decode attention beside ours in skv bench kernels", "pip install flashinfer-python"),
        "vllm": ("skv bench throughput --engine vllm", "pip install vllm"),
    }
)
_COLOURS = MappingProxyType({"here": "green", "missing": "yellow", "broken": "red"})
_COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for. `found` is empty where it is missing; `broken` is what stops skv."""

    name: str
    found: str = ""
    enables: str = ""
    command: str = ""
    broken: bool = False

    @property
    def state(self) -> str:
        """In a word."""
        return "broken" if self.broken else "here" if self.found else "missing"


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")] = False,
) -> int:
    """What is installed, pulled and there to compute with; what is missing, what it would enable, and how to get it.

    Nothing is loaded, fetched or changed. Exit code 1 if something that skv cannot do without is broken.
    """
    found = {group: list(check()) for group, check in CHECKS.items()}
    findings = [finding for group in found.values() for finding in group]
    if as_json:
        told = {group: [{**asdict(one), "state": one.state} for one in same] for group, same in found.items()}
        print(json.dumps(told, indent=1))
    else:
        _show(found)
    return 1 if any(finding.broken for finding in findings) else 0


def _show(found: Mapping[str, list[Finding]]) -> None:
    """A line each, whole on any terminal: commands are there to be copied."""
    from rich.markup import escape

    from cli.shared.render import console

    shown = console()
    for group, findings in found.items():
        shown.print(f"[bold]{group}[/]")
        for one in findings:
            line = one.found or f"missing; would enable {one.enables}"
            got = f"  ->  {one.command}" if one.command else ""
            colour = _COLOURS[one.state]
            shown.print(f"  [{colour}]{one.name:18}[/] {escape(line + got)}", highlight=False, soft_wrap=True)


def _packages() -> Iterator[Finding]:
    """skv, Python, and the packages that skv requires."""
    import importlib.metadata as metadata
    import platform

    from packaging.requirements import Requirement

    yield Finding("skv", metadata.version("skv"))
    yield Finding("python", platform.python_version())
    required = [Requirement(line) for line in metadata.requires("skv") or ()]
    required = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    fine = 0
    for one in required:
        version = installed(one.name)
        if version is None or not one.specifier.contains(version, prereleases=True):
            needed = f"pip install '{one.name}{one.specifier}'"
            yield Finding(one.name, f"{version or 'not installed'}, but skv needs {one}", "skv", needed, broken=True)
            continue
        fine += 1
        if one.name in _SHOWN:
            yield Finding(one.name, version)
    yield Finding("required packages", f"{fine} of {len(required)}")


def _torch() -> Iterator[Finding]:
    """Whether torch loads: its version alone does not say so."""
    torch, why_not = load_torch()
    if torch is None:
        yield Finding("torch loads", why_not, "skv", "pip install --force-reinstall torch", broken=True)
    else:
        yield Finding("torch is built", f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only")


def load_torch() -> tuple[Any, str]:
    """torch, or None and why it does not load."""
    from shadowkv.common.wording import one_line

    try:
        import torch
    except Exception as error:  # a library that is missing, or is another version's: there is no end to what it raises
        return None, one_line(error)
    return torch, ""


def _optional() -> Iterator[Finding]:
    """Packages that skv can do without."""
    for name, (enables, command) in _OPTIONAL.items():
        version = installed(name)
        yield Finding(name, version) if version else Finding(name, "", enables, command)


def installed(name: str) -> str | None:
    """The version of an installed package."""
    import importlib.metadata as metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packs() -> Iterator[Finding]:
    """What `skv pull` brings."""
    from shadowkv.models import packs

    for pack in packs.packs().values():
        there = packs.pack_path(pack.name) is not None
        summary = f"pulled: {pack.summary}" if there else ""
        yield Finding(pack.name, summary, "" if there else pack.summary, "" if there else f"skv pull {pack.name}")


def _presets() -> Iterator[Finding]:
    """Models whose weights come from the Hub."""
    from shadowkv.models.presets import presets
    from shadowkv.models.resolving import is_here

    for preset in presets().values():
        if preset.pack is not None:
            continue
        if is_here(preset):
            yield Finding(preset.name, f"in the Hub's cache: {preset.hub_id}")
            continue
        licence = f"accept the licence on https://huggingface.co/{preset.hub_id}, hf auth login, " * preset.gated
        yield Finding(preset.name, "", f"runs of --model {preset.name}", f"{licence}hf download {preset.hub_id}")


def _places() -> Iterator[Finding]:
    """Where things are kept, and whether anything may be fetched."""
    import shutil

    from shadowkv.common.home import skv_home
    from shadowkv.common.online import forbidden_by

    home = skv_home()
    there = next(path for path in (home, *home.parents) if path.exists())
    yield Finding("SKV_HOME", f"{home}, {shutil.disk_usage(there).free / 2**30:.0f} GiB free")
    setting = forbidden_by()
    yield Finding("fetching", f"forbidden by {setting}" if setting else "allowed, on the way or by skv pull")


def _computers() -> Iterator[Finding]:
    """Cores, memory and GPUs."""
    import os

    from shadowkv.tensors.host_memory import available_host_bytes

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("cores", str(os.cpu_count()))
    yield Finding("memory", f"{total:.0f} GiB, {available_host_bytes() / 2**30:.0f} free")
    yield from _gpus()


def _gpus() -> Iterator[Finding]:
    import shutil

    torch, _ = load_torch()
    if not _has_gpu():
        driver = shutil.which("nvidia-smi") is not None
        helps = "a torch that is built for your driver: see pytorch.org" if driver else "skv plan: what one would bring"
        yield Finding("GPU", "", "the fast engine, and models of billions of parameters", helps)
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        held = f"{total / 2**30:.0f} GiB, {free / 2**30:.0f} free"
        yield Finding(f"cuda:{number}", f"{torch.cuda.get_device_name(number)}, {held}, sm_{major}{minor}")


def _kernels() -> Iterator[Finding]:
    """Whether Triton's kernels can be compiled, or only interpreted."""
    import os
    import shutil

    named = os.environ.get("CC")
    compiler = next(filter(None, map(shutil.which, [named] if named else _COMPILERS)), None)
    gets = "apt-get install gcc, or the like"
    yield Finding("C compiler", compiler or "", *(() if compiler else ("Triton, which compiles its launcher", gets)))
    if installed("triton") is None:
        yield Finding("kernels", "", "kernels compiled for a GPU, or interpreted", _OPTIONAL["triton"][1])
    elif compiler is None:
        yield Finding("kernels", "", "kernels compiled for a GPU", gets)
    elif _has_gpu():
        yield Finding("kernels", "compiled, for the GPU that is here: skv bench kernels")
    else:
        yield Finding(
            "kernels", "interpreted, or compiled for GPUs that are not here: skv bench kernels --compile sm_90"
        )


def _has_gpu() -> bool:
    torch, _ = load_torch()
    return torch is not None and bool(torch.cuda.is_available())


CHECKS: Mapping[str, Callable[[], Iterator[Finding]]] = MappingProxyType(
    {
        "required": lambda: chain(_packages(), _torch()),
        "optional packages": _optional,
        "packs": _packs,
        "models on the Hub": _presets,
        "places": _places,
        "machine": _computers,
        "kernels": _kernels,
    }
)
