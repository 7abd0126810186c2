"""The run folder: run.json first, then one flushed line per answer; continued by running the command again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, get_args, get_origin, get_type_hints

from filelock import FileLock, Timeout

from evals.common.asking.drawing import prompt_name
from evals.common.asking.question import IN_PROMPT
from evals.runs.manifest import Manifest
from evals.runs.task import Question
from shadowkv.common.errors import SkvError
from shadowkv.common.reading import decoded


class Kept(Protocol):
    """A record that a run folder can hold: a dataclass, one line of JSON each."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    FILE: ClassVar[str]

    @property
    def key(self) -> Hashable: ...

    @property
    def final(self) -> bool:
        """Whether what it answers is settled; otherwise it may be tried again."""


R = TypeVar("R", bound=Kept)


class Key(NamedTuple):
    """What a record answers: one example under one method."""

    benchmark: str
    task: str
    length: int
    sample: str
    question: str
    method: str


class OfPrompt:
    """What every record of a prompt and a method is found by."""

    benchmark: str
    task: str
    length: int
    sample: str
    question: str
    method: str

    @property
    def key(self) -> Key:
        return Key(self.benchmark, self.task, self.length, self.sample, self.question, self.method)

    @property
    def asked(self) -> Question:
        """What was asked, whatever the method."""
        return Question(self.task, self.length, self.sample, self.question)


@dataclass(frozen=True)
class Record(OfPrompt):
    """One answer. `score` is null unless `status` is ok: a failure is never a zero."""

    FILE: ClassVar[str] = "samples.jsonl"

    benchmark: str
    task: str
    length: int
    sample: str
    method: str
    score: float | None
    status: str  # ok, oom or error
    error: str | None
    prediction: str
    references: list[str]
    prompt_tokens: int  # held before the answer
    reused_tokens: int
    new_tokens: int
    tokens: list[int]
    stopped: bool
    prefill_s: float
    build_s: float  # making the cache, and feeding a question that comes after; of a later turn, feeding alone
    decode_s: float
    device_bytes: int
    host_bytes: int
    prompt_sha256: str
    meta: dict[str, Any] = field(default_factory=dict)
    attended_tokens: float | None = None  # per decode step, mean over layers and heads; None in older records
    bus_bytes: int | None = None  # between host and device, per decoded token; None in older records
    prompt_tail: str | None = None  # its last tokens as text; None in older records
    question: str = IN_PROMPT  # where it stands: in-prompt, or after what the method took over

    @property
    def prompt(self) -> tuple[str, int, str]:
        """What was asked: the same of several answers to it."""
        return self.task, self.length, prompt_name(self.sample)

    @property
    def final(self) -> bool:
        return self.score is not None

    @property
    def shown(self) -> str:
        """What a line of progress says of it."""
        return self.prediction

    @property
    def decode_ms_per_token(self) -> float | None:
        """Time of one decode step; the first token costs none, since it comes from the prefill."""
        steps = self.new_tokens if self.stopped else self.new_tokens - 1
        return 1000 * self.decode_s / steps if steps > 0 and self.status == "ok" else None


class RunFolder(Generic[R]):
    """Records of one run, read from and appended to the file of their kind; use `open_run` to get one."""

    def __init__(self, path: Path, manifest: Manifest, kind: type[R]) -> None:
        self.path = path
        self.manifest = manifest
        self.file = path / kind.FILE
        self.repaired_lines, self.records = _read(self.file, kind, repair=True)

    def has(self, key: Hashable) -> bool:
        """Whether this question is answered; a failed one may be tried again."""
        return key in self.records and self.records[key].final

    def append(self, record: R) -> None:
        """Write one record and make sure it stays written."""
        if self.has(record.key):
            raise ValueError(f"{record.key} is already answered")
        line = (json.dumps(asdict(record), ensure_ascii=False) + "\n").encode()
        file = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(file, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        except OSError as error:
            raise SkvError(f"cannot write to {self.path}: {error.strerror}") from error
        finally:
            os.close(file)
        self.records[record.key] = record


def open_run(path: Path, manifest: Manifest) -> AbstractContextManager[RunFolder[Record]]:
    """`open_records` of answers."""
    return open_records(path, manifest, Record)


@contextmanager
def open_records(path: Path, manifest: Manifest, kind: type[R]) -> Iterator[RunFolder[R]]:
    """Start or continue the run in `path`, alone.

    Raises `SkvError` if another process is writing there, if the folder holds another configuration (naming what
    differs), or if it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock")  # an flock: it goes when its owner does, however that ends
        lock.acquire(timeout=0)
    except Timeout:
        raise SkvError(f"another skv process is writing to {path}") from None
    except OSError as error:
        raise SkvError(f"cannot write to {path}: {error.strerror or error}") from error
    try:
        yield RunFolder(path, _described(path, manifest, kind.FILE), kind)
    finally:
        lock.release()


def _described(path: Path, manifest: Manifest, file: str) -> Manifest:
    """Write run.json, or check that the one there is of this configuration and add to it."""
    described = path / "run.json"
    if described.is_file():
        older = Manifest.read(described)
        differing = "; ".join(manifest.differences(older))
        if differing:
            raise SkvError(f"{path} holds a run of another configuration; choose another --out ({differing})")
        manifest = manifest.continuing(older)
    elif (path / file).exists():
        raise SkvError(f"{path} holds records but no run.json; choose another --out")
    try:
        manifest.write(described)
    except OSError as error:
        raise SkvError(f"cannot write to {path}: {error.strerror or error}") from error
    return manifest


def read_run(path: Path) -> tuple[Manifest, list[Record]]:
    """`read_records` of answers."""
    return read_records(path, Record)


def read_records(path: Path, kind: type[R]) -> tuple[Manifest, list[R]]:
    """A run folder as it is, without touching it."""
    if not (path / "run.json").is_file():
        raise SkvError(f"{path} is not a run folder: it holds no run.json")
    _, records = _read(path / kind.FILE, kind, repair=False)
    return Manifest.read(path / "run.json"), list(records.values())


def salvage(path: Path, kind: type[R]) -> tuple[list[R], list[int]]:
    """Records of a file that may be damaged, and the numbers of the lines that are. The file is left as it is."""
    records: dict[Hashable, R] = {}
    damaged = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        record = _parse(line, kind)
        if record is None or not sound(record):
            damaged.append(number)
        elif record.key not in records or not records[record.key].final:
            records[record.key] = record
    return list(records.values()), damaged


def sound(kept: Any) -> bool:
    """Whether every field of a dataclass read from a file, and every element of a list in it, is of its type."""
    for name, (allowed, elements) in _types(kept.__class__).items():
        value = getattr(kept, name)
        if not isinstance(value, allowed):
            return False
        if elements and isinstance(value, list) and not all(isinstance(item, elements) for item in value):
            return False
    return True


@cache
def _types(kind: type[Any]) -> dict[str, tuple[tuple[type, ...], tuple[type, ...]]]:
    """By field: the classes that it may be of, and those of its elements."""
    hints = get_type_hints(kind)
    types = {}
    for name in (declared.name for declared in fields(kind)):
        options = get_args(hints[name]) if get_origin(hints[name]) is UnionType else (hints[name],)
        elements = tuple(item for option in options if get_origin(option) is list for item in get_args(option))
        types[name] = (_classes(options), _classes(elements))
    return types


def _classes(options: tuple[Any, ...]) -> tuple[type, ...]:
    """What JSON makes of these types; a whole number is a float, too."""
    plain = tuple(get_origin(option) or option for option in options)
    return (*plain, int) if float in plain else plain


def _read(path: Path, kind: type[R], *, repair: bool) -> tuple[int, dict[Hashable, R]]:
    """Records by key, after completing or cutting off a last line that a killed process left unfinished."""
    if not path.is_file():
        return 0, {}
    raw = path.read_bytes()
    whole, _, torn = raw.rpartition(b"\n")
    whole = whole + b"\n" if whole or raw[:1] == b"\n" else whole
    if torn and repair:
        complete = _parse(torn, kind) is not None
        with path.open("r+b") as file:
            file.seek(len(raw) if complete else len(whole))
            file.write(b"\n" if complete else b"")
            file.truncate()
    records: dict[Hashable, R] = {}
    lines = whole.splitlines() + ([torn] if torn and _parse(torn, kind) is not None else [])
    for number, line in enumerate(lines, 1):
        record = _parse(line, kind)
        if record is None:
            decoded(line, str(path), number)  # names what an editor has made of it
            raise SkvError(f"line {number} of {path} is damaged; remove it to go on without that record")
        if record.key not in records or not records[record.key].final:
            records[record.key] = record
    return int(bool(torn)), records


def _parse(line: bytes, kind: type[R]) -> R | None:
    try:
        return kind(**json.loads(line))
    except (ValueError, TypeError):
        return None
