"""Run folders as they are found: whatever is readable, and by name what is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from evals.common.asking.question import shown
from evals.common.grouping import grouped
from evals.reporting.presentations import PRESENTATIONS
from evals.runs.forced.record import ForcedRecord
from evals.runs.manifest import Manifest, SchemaError
from evals.runs.results import Record, salvage, sound
from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean

_UNKNOWN = {"name": "unknown model", "source": None, "weights_sha256": None, "dummy": None, "dtype": "?", "device": "?"}
_NAMED = 3  # examples given of what is wrong


@dataclass(frozen=True)
class Run:
    """One folder. `records` are of its benchmark's kind; `problems` say what is missing or was left out."""

    name: str  # no two runs of a report have the same one
    path: Path
    manifest: Manifest
    records: Sequence[Any]
    problems: Sequence[str]

    @property
    def is_accuracy(self) -> bool:
        return self.manifest.benchmark in PRESENTATIONS

    @property
    def answers(self) -> Sequence[Record]:
        """Records of an accuracy run, none of another."""
        return self.records if self.is_accuracy else []


@dataclass(frozen=True)
class Found:
    """What several paths hold: runs, and why others are none."""

    runs: Sequence[Run]
    left_out: Mapping[str, str]


def find_runs(paths: Sequence[Path]) -> Found:
    """Read every folder. Raises `SkvError` if one does not exist, is given twice, or none can be reported."""
    for path in paths:
        if not path.is_dir():
            siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise SkvError(f"{path} is not a folder{did_you_mean(path.name, siblings)}")
    places = [path.resolve() for path in paths]
    twice = [str(path) for place, path in zip(places, paths, strict=True) if places.count(place) > 1]
    if twice:
        raise SkvError(f"{twice[0]} is given twice")
    runs, left_out = [], {}
    for path, name in zip(paths, _names(places), strict=True):
        try:
            runs.append(_read(name, path))
        except SkvError as error:
            left_out[name] = str(error)
    if not runs:
        raise SkvError("; ".join(left_out.values()))
    return Found(runs, MappingProxyType(left_out))


def make_folder(path: Path) -> None:
    """A folder to write to, with its parents. Raises `SkvError` where there can be none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SkvError(f"cannot write to {path}: {error.strerror}") from error


def _names(places: Sequence[Path]) -> list[str]:
    """Folder names, with those of parents as far as it takes to tell them apart."""
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def _read(name: str, path: Path) -> Run:
    kinds = [kind for kind in _kinds() if (path / kind.FILE).is_file()]
    if not kinds:
        wanted = ", ".join(kind.FILE for kind in _kinds())
        raise SkvError(f"{path} holds no results ({wanted}): nothing to report")
    kind, problems = kinds[0], []
    records, damaged = salvage(path / kind.FILE, kind)
    if damaged:
        problems.append(f"{kind.FILE}: {_lines(damaged)} damaged or unfinished, left out")
    if not records:
        raise SkvError(f"{path / kind.FILE} holds no whole record: nothing to report")
    try:
        manifest = _described(path / "run.json")
    except SchemaError:
        raise
    except (SkvError, OSError) as error:
        why = "is missing" if isinstance(error, OSError) else "cannot be read"
        problems.append(f"run.json {why}: model, settings and notes are unknown; figures may be of dummy weights")
        manifest = _stand_in(kind, records, problems[-1])
    usable, more = _CHECKS.get(kind.FILE, _nothing_to_check)(manifest, records)
    if not usable:
        raise SkvError(f"{path / kind.FILE}: {'; '.join(more)}")
    return Run(name, path, manifest, usable, [*problems, *more])


@cache
def _kinds() -> tuple[Any, ...]:
    from evals.bench.kernels.kernels import KernelRecord
    from evals.bench.latency.profile import LatencyRecord
    from evals.bench.records import BenchRecord

    return Record, ForcedRecord, BenchRecord, LatencyRecord, KernelRecord


def _described(path: Path) -> Manifest:
    """A run.json that says what it must, though perhaps not all of the model."""
    manifest = Manifest.read(path)
    if not sound(manifest) or not all(map(sound, manifest.sessions)):
        raise SkvError(f"{path} has fields of another type")
    return replace(manifest, model={**_UNKNOWN, **manifest.model})


def _lines(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_NAMED])) + (f" and {len(numbers) - _NAMED} more" * (len(numbers) > _NAMED))
    return f"line {shown} is" if len(numbers) == 1 else f"lines {shown} are"


def _stand_in(kind: Any, records: Sequence[Any], note: str) -> Manifest:
    """What a run's records alone say of it."""
    asked = kind in (Record, ForcedRecord)
    benchmark = records[0].benchmark if asked else Path(kind.FILE).stem
    machine = {} if asked else {"machine": records[0].machine}
    return Manifest(benchmark, machine, {}, {}, dict(_UNKNOWN), {}, [note])


def _nothing_to_check(_: Manifest, records: Sequence[Any]) -> tuple[Sequence[Any], list[str]]:
    return records, []


def _check_answers(manifest: Manifest, records: Sequence[Record]) -> tuple[Sequence[Record], list[str]]:
    """Answers that can be summed up, and what is odd about the others."""
    presentation = PRESENTATIONS.get(manifest.benchmark)
    if presentation is None:
        known = ", ".join(PRESENTATIONS)
        asked = f"'{manifest.benchmark}'{did_you_mean(manifest.benchmark, PRESENTATIONS)}"
        return [], [f"unknown benchmark {asked}; known: {known}"]
    problems = []
    others = [r for r in records if r.benchmark != manifest.benchmark]
    mine = [r for r in records if r.benchmark == manifest.benchmark]
    bare = [r for r in mine if any(key not in r.meta for key in presentation.needs)]
    out = {id(r) for r in bare}
    for found, why in ((others, f"not of {manifest.benchmark}"), (bare, f"without {' or '.join(presentation.needs)}")):
        if found:
            problems.append(f"{len(found)} answers {why}, left out: {_examples(found)}")
    kept = [r for r in mine if id(r) not in out]
    wrong = {id(r) for r in kept if r.score is not None and not 0 <= r.score <= 1}
    if wrong:
        named = _examples([r for r in kept if id(r) in wrong])
        problems.append(f"{len(wrong)} scores are not between 0 and 1 (or NaN) and count as unscored: {named}")
    kept = [
        replace(r, score=None, status="error", error=f"the file says its score is {r.score}") if id(r) in wrong else r
        for r in kept
    ]
    return kept, [*problems, *_incomplete(manifest, kept)]


def _check_forced(manifest: Manifest, records: Sequence[ForcedRecord]) -> tuple[Sequence[ForcedRecord], list[str]]:
    """Distances that can be summed up: as many of each kind, all of them numbers."""
    kept = [r for r in records if not r.final or _whole(r)]
    lost = [r for r in records if r.final and not _whole(r)]
    problems = [f"{len(lost)} records whose distances are no numbers or not as many, left out"] if lost else []
    return kept, [*problems, *_incomplete(manifest, kept)]


def _whole(record: ForcedRecord) -> bool:
    rows = (record.kl, record.nll, record.full_nll, record.top1, record.top5, record.rank)
    return (
        len({len(row) for row in rows}) == 1 and bool(record.kl) and all(math.isfinite(x) for row in rows for x in row)
    )


def _incomplete(manifest: Manifest, records: Sequence[Record | ForcedRecord]) -> list[str]:
    """What methods lack of the prompts that any of them answered."""
    asked = {r.asked for r in records}
    held = {label: len(found) for label, found in grouped(records, lambda r: r.method).items()}
    without = [label for label in manifest.methods if label not in held]
    what = "answers given" if any("answer" in r.meta for r in records) else "prompts answered"
    said = [f"{label}: {count} of {len(asked)} {what}" for label, count in held.items() if count < len(asked)]
    said += [f"{label}: no answer" for label in without]
    if len(held) == 1:
        said.append(f"one method only ({records[0].method}): nothing to compare it with")
    unscored = sum(not r.final for r in records)
    return said + ([f"{unscored} of {len(records)} answers are unscored"] if unscored else [])


def _check_measurements(_: Manifest, records: Sequence[Any]) -> tuple[Sequence[Any], list[str]]:
    kept = [r for r in records if all(math.isfinite(ms) and ms > 0 for ms in r.step_ms)]
    lost = len(records) - len(kept)
    return kept, [f"{lost} measurements with times that are no positive numbers, left out"] if lost else []


def _examples(records: Sequence[Record]) -> str:
    named = [f"{shown(r.method, r.question)} {r.task} {r.length} {r.sample}" for r in records[:_NAMED]]
    return "; ".join(named) + ("; …" if len(records) > _NAMED else "")


_Check = Callable[[Manifest, Sequence[Any]], tuple[Sequence[Any], list[str]]]
_CHECKS: Mapping[str, _Check] = MappingProxyType(
    {Record.FILE: _check_answers, ForcedRecord.FILE: _check_forced, "throughput.jsonl": _check_measurements}
)
