"""The two run folders of a comparison: read, and refused where they do not compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from evals.bench.records import BenchRecord
from evals.reporting.presentations import PRESENTATIONS
from evals.runs.forced.record import ForcedRecord
from evals.runs.manifest import Manifest, Session
from evals.runs.results import Kept, Record, read_records
from shadowkv.common.errors import SkvError

R = TypeVar("R", bound=Kept)
Asked = TypeVar("Asked", Record, ForcedRecord)  # records of a prompt
# How a prefill is cut into chunks changes rounding only, and follows the device. Where questions stand is a part of
# every answer's key: only answers that were asked for alike are paired.
_MAY_DIFFER = frozenset({"config.prefill_chunk_tokens", "config.streamed", "config.question"})
_SHOWN = 6  # names and differences that fit a line


@dataclass(frozen=True)
class Side(Generic[R]):
    """One of the two: what it is called in messages, and what it holds."""

    name: str
    path: Path
    manifest: Manifest
    records: list[R]

    @property
    def described(self) -> str:
        """Where it comes from, in one line."""
        session = self.manifest.sessions[-1]
        written_by = dict.fromkeys(_commit(session) for session in self.manifest.sessions)
        machine = session.machine.get("gpu") or session.machine.get("cpu")
        known = [name for name in ("torch", "transformers") if name in session.versions]
        versions = " ".join(f"{name} {session.versions[name]}" for name in known)
        commits = " and then ".join(written_by)
        return f"{self.name} {self.path}: commit {commits}, {session.started}, {machine}, {versions}"


def read_manifest(name: str, path: Path) -> Manifest:
    """The run.json of a side. Raises `SkvError` that says what is there instead."""
    if not path.is_dir():
        raise SkvError(f"{name} {path}: {'is a file, not a run folder' if path.exists() else 'no such folder'}")
    if not (path / "run.json").is_file():
        raise SkvError(f"{name} {path} is not a run folder: it holds no run.json, {_held(path)}")
    return Manifest.read(path / "run.json")


def read_side(name: str, path: Path, manifest: Manifest, kind: type[R]) -> Side[R]:
    """A side with its records. Raises `SkvError` where there are none."""
    if not manifest.sessions:
        raise SkvError(f"{path / 'run.json'} names no session that wrote it")
    _, records = read_records(path, kind)
    if not records:
        raise SkvError(f"{name} {path} is a run that was begun and holds no record in {kind.FILE}, {_held(path)}")
    return Side(name, path, manifest, records)


def kind_of(manifest: Manifest, path: Path) -> type[Record] | type[ForcedRecord] | type[BenchRecord]:
    """What the records of a run are. Raises `SkvError` for runs that are not compared."""
    if manifest.benchmark in PRESENTATIONS:
        return Record
    others: dict[str, type[ForcedRecord] | type[BenchRecord]] = {"fidelity": ForcedRecord, "throughput": BenchRecord}
    if manifest.benchmark in others:
        return others[manifest.benchmark]
    compared = ", ".join([*PRESENTATIONS, *others])
    raise SkvError(f"{path} is a run of '{manifest.benchmark}'; compared are {compared}")


def refuse_different(baseline: Manifest, current: Manifest, ignored: frozenset[str]) -> None:
    """Raise `SkvError` naming every field that makes two runs incomparable, but for those `ignored`."""
    before, after = _fixed(baseline), _fixed(current)
    fields = [name for name in {**before, **after} if name not in ignored]
    refuse(
        [f"{name}: {before.get(name)} -> {after.get(name)}" for name in fields if before.get(name) != after.get(name)]
    )


def refuse_other_questions(baseline: Side[Asked], current: Side[Asked]) -> None:
    """Raise `SkvError` unless both asked the same of the same prompts, as far as they hold the same ones."""
    refuse_different(baseline.manifest, current.manifest, _MAY_DIFFER)
    refuse(other_parameters(baseline.manifest, current.manifest))
    before, after = (_lengths(side) for side in (baseline, current))
    refuse([] if before == after else [f"lengths: {before} -> {after}"])
    prompts = {record.key: record.prompt_sha256 for record in baseline.records}
    other = [r for r in current.records if r.key in prompts and prompts[r.key] != r.prompt_sha256]
    if other:
        first = f"{other[0].task} @ {other[0].length} {other[0].sample}"
        refuse([f"prompts: {len(other)} samples have another prompt_sha256, the first is {first}"])


def _lengths(side: Side[Asked]) -> list[int]:
    """Of what was asked, and of what is there: a run may have been stopped, or have grown."""
    return sorted({*side.manifest.selection.get("lengths", ()), *(record.length for record in side.records)})


def shared_methods(baseline: Side[R], current: Side[R], notes: list[str]) -> list[str]:
    """Methods in both, in the baseline's order. Of a method only one side has, nothing can be said: that is noted."""
    before, after = baseline.manifest.methods, current.manifest.methods
    shared = [label for label in before if label in after]
    if not shared:
        raise SkvError(
            f"no method in common: {baseline.name} has {', '.join(before)}; {current.name} {', '.join(after)}"
        )
    for side, names in ((baseline, before.keys() - after.keys()), (current, after.keys() - before.keys())):
        if names:
            notes.append(f"only in {side.name}: {', '.join(sorted(names))}")
    return shared


def differing_circumstances(baseline: Side[R], current: Side[R]) -> list[str]:
    """What may change answers without being anybody's regression; and what tables of either run must say."""
    notes = []
    for key, matters in (
        ("name", ""),
        ("dtype", "; KV bytes are not compared"),
        ("device", "; KV bytes are not compared"),
    ):
        before, after = (side.manifest.model.get(key) for side in (baseline, current))
        if before != after:
            notes.append(f"model.{key} differs: {before} -> {after}{matters}")
    said = {f"{side.name}: {note}" for side in (baseline, current) for note in side.manifest.notes}
    return [*notes, *sorted(said)]


def same_bytes(baseline: Side[R], current: Side[R]) -> bool:
    """Whether KV bytes compare: another type of numbers holds other bytes, and a GPU keeps other things on itself."""
    return all(baseline.manifest.model.get(k) == current.manifest.model.get(k) for k in ("dtype", "device"))


def refuse(differences: list[str]) -> None:
    """Raise `SkvError` if there is any difference."""
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise SkvError(f"these runs do not compare: {'; '.join(differences[:_SHOWN])}{more}")


def _fixed(manifest: Manifest) -> dict[str, Any]:
    """What must be equal, by dotted name. Parameters that only one side's version of a method has do not count."""
    model = {key: manifest.model.get(key) for key in ("weights_sha256", "dummy")}
    for key in ("adapter", "not_loaded"):  # each makes another model of the same files
        model[key] = (manifest.model.get(key) or {}).get("sha256")
    if model["weights_sha256"] is None:  # random weights: all there is to tell them by
        model |= {key: manifest.model.get(key) for key in ("name", "source")}
    parts = {"config": manifest.config, "model": model, "sources": manifest.sources}
    return {"benchmark": manifest.benchmark, **_flat(parts)}


def other_parameters(baseline: Manifest, current: Manifest) -> list[str]:
    """Methods of one label that are not one setting, parameter by parameter; new parameters do not count."""
    return [
        f"methods.{label}.{name}: {before[name]} -> {after[name]}"
        for label, before in baseline.methods.items()
        if (after := current.methods.get(label)) is not None
        for name in before
        if name in after and before[name] != after[name]
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _commit(session: Session) -> str:
    found = session.git or {}
    return f"{found.get('commit', 'unknown')[:9]}{' with changes' if found.get('dirty') else ''}"


def _held(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"only {', '.join(names[:_SHOWN])}{more}" if names else "it is empty"
