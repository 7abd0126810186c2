"""run.json: everything needed to know what a run was, and to prove that two runs are comparable."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evals.common.asking.question import AFTER, BOTH
from shadowkv.common.errors import SkvError
from shadowkv.common.reading import read_text
from shadowkv.models.weights import first_names

if TYPE_CHECKING:
    from shadowkv.contract.setting import Setting
    from shadowkv.models.loading import LoadedModel

SCHEMA = 1
_PACKAGES = (
    "skv",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "numpy",
    "pandas",
    "matplotlib",
    "triton",
    "flashinfer-python",
)


class SchemaError(SkvError):
    """A run.json of another version, whose records may mean something else."""


@dataclass(frozen=True)
class Session:
    """One command that wrote into a run folder."""

    command: str
    started: str
    versions: dict[str, str]
    git: dict[str, Any] | None
    machine: dict[str, Any]
    self_check: dict[str, Any] | None = None  # what was compared and how it differed; None if it was not asked for


class Circumstances(NamedTuple):
    """What only a process that answers can tell of a run."""

    model: dict[str, Any]
    prefill_chunk_tokens: int
    session: Session


@dataclass(frozen=True)
class Manifest:
    """`config` is what changes a number and must stay; what was selected of it, and by whom, may grow."""

    benchmark: str
    config: dict[str, Any]
    methods: dict[str, dict[str, Any]]  # label -> every parameter
    selection: dict[str, Any]
    model: dict[str, Any]
    sources: dict[str, Any]
    notes: list[str]
    sessions: list[Session] = field(default_factory=list)
    schema: int = SCHEMA

    def differences(self, older: Manifest) -> list[str]:
        """What keeps this run from continuing `older`, one `field: old -> new` each."""
        mine, theirs = self._fixed(), older._fixed()
        changed = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
        shared = self.methods.keys() & older.methods.keys()
        lines = [f"{k}: {theirs.get(k)} -> {mine.get(k)}" for k in changed]
        return lines + [
            f"parameters of {label}: {older.methods[label]} -> {self.methods[label]}"
            for label in sorted(shared)
            if self.methods[label] != older.methods[label]
        ]

    def _fixed(self) -> dict[str, Any]:
        parts = {"": self.config, "model.": self.model, "sources.": self.sources}
        flat = {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}
        return {"benchmark": self.benchmark, "schema": self.schema, **flat}

    def continuing(self, older: Manifest) -> Manifest:
        """This manifest with what `older` already held."""
        return Manifest(
            **{
                **{name: getattr(self, name) for name in self.__dataclass_fields__},
                "methods": {**older.methods, **self.methods},
                "notes": [*self.notes, *older._notes_beside(self)],
                "sessions": [*older.sessions, *self.sessions],
            }
        )

    def _notes_beside(self, newer: Manifest) -> list[str]:
        """What is noted of methods that a later command does not name."""
        others = tuple(f"{label}: " for label in self.methods.keys() - newer.methods.keys())
        return [note for note in self.notes if note.startswith(others)]

    @property
    def marks(self) -> list[str]:
        """How far this run is from the real thing, and where its questions stand if not in the prompt."""
        return self._marks(self.config.get("question"))

    @property
    def title(self) -> str:
        """One line that says what was run on what, and its marks."""
        return self.title_of(self.config.get("question"))

    def title_of(self, place: str | None) -> str:
        """The title of those answers whose questions stand at a place."""
        model, marks = self.model, self._marks(place)
        return " ".join([f"{self.benchmark} · {model['name']} · {model['dtype']} on {model['device']}", *marks])

    def _marks(self, place: str | None) -> list[str]:
        marks = {"dummy weights": self.model.get("dummy"), "synthetic KV": self.config.get("synthetic_kv")}
        marks["hits made"] = self.config.get("hits") is not None
        marks["question after"] = place == AFTER
        marks["question in the prompt, and after"] = place == BOTH
        return [f"[{mark}]" for mark, on in marks.items() if on]

    @property
    def commands(self) -> list[str]:
        """That made this run, each as it can be pasted."""
        return list(dict.fromkeys(session.command for session in self.sessions))

    @property
    def folder_name(self) -> str:
        """Where a run goes that is told no folder: the same configuration always to the same one."""
        fixed = json.dumps([self.config, self.model, self.sources], sort_keys=True)
        digest = hashlib.sha256(fixed.encode()).hexdigest()[:8]
        return f"{self.benchmark}-{self.model['name'].replace('/', '--')}-{digest}"

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read a run.json; raises `SkvError` if it is not one."""
        try:
            raw = json.loads(read_text(path))
            if raw.get("schema", SCHEMA) != SCHEMA:
                raise SchemaError(f"{path} is of schema {raw['schema']!r}; this version of skv reads schema {SCHEMA}")
            return Manifest(**{**raw, "sessions": [Session(**session) for session in raw["sessions"]]})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SkvError(f"{path} is not a run.json of this version of skv ({error})") from None


def session_of(loaded: LoadedModel) -> Session:
    """The command being run, here and now, on a loaded model."""
    session = this_session(["skv", *sys.argv[1:]], loaded.device)
    return replace(session, self_check=None if loaded.self_check is None else asdict(loaded.self_check))


def unchecked_note(session: Session) -> list[str]:
    """What tables must say of a run whose model was not held against itself."""
    untested = "that this model runs through skv as it is was not tested"
    if session.self_check is None:
        return [f"the self-check was skipped (--no-self-check): {untested}"]
    overflows = session.self_check["layer_error"] is None
    return [f"the self-check found this model's own numbers not finite: {untested}"] if overflows else []


def this_session(argv: Sequence[str], device: str) -> Session:
    """The command being run, here and now."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    machine = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
    }
    return Session(
        command=" ".join(argv),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"python": platform.python_version(), **_versions()},
        git=_git(Path(__file__).parent),
        machine=machine,
    )


def model_entry(loaded: LoadedModel) -> dict[str, Any]:
    """What run.json says of the model; which of several GPUs it was on makes no difference."""
    said = {key: getattr(loaded, key) for key in ("name", "source", "weights_sha256", "dummy", "dtype", "device")}
    more: dict[str, Any] = {}
    if loaded.adapter is not None:
        more["adapter"] = {key: getattr(loaded.adapter, key) for key in ("name", "base", "sha256")}
    if loaded.not_loaded:
        names = sorted(loaded.not_loaded)
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        more["not_loaded"] = {"count": len(names), "first": first_names(names), "sha256": digest}
    return {**said, "device": loaded.device.partition(":")[0], **more}


def weight_notes(model: Mapping[str, Any]) -> list[str]:
    """What every table must say of the weights, by the model's entry in run.json."""
    notes = []
    if adapter := model.get("adapter"):
        notes.append(
            f"the adapter {adapter['name']}, of {adapter['base']} by its own account, is merged into the weights"
        )
    if left := model.get("not_loaded"):
        notes.append(f"not loaded, of what the files hold: {left['first']} ({left['count']} in all)")
    return notes


def method_notes(methods: Iterable[Setting]) -> list[str]:
    """What every table must say of these settings."""
    return [f"{method.label}: {note}" for method in methods for note in method.notes()]


def described(method: Setting) -> dict[str, Any]:
    """Every parameter of a method, and the checksum of each file that one names."""
    sums = {f"{key}.sha256": hashlib.sha256(path.read_bytes()).hexdigest() for key, path in method.files().items()}
    return {**method.params(), **sums}


def plain(value: Any) -> Any:
    """A JSON-ready copy: tuples become lists, mappings become dicts."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional, such as triton on a CPU
    return found


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, if it is one."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
        except OSError:
            return None  # no git on this machine
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "dirty": bool(ask("status", "--porcelain", "-uno"))}


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
