"""LongBench's rows: from a folder, a zip file, or the Hub's data.zip."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.common.jsonl import check_text, parse_jsonl
from evals.longbench.tasks import TASKS
from shadowkv.common.errors import SkvError
from shadowkv.common.home import sha256_of
from shadowkv.common.online import forbidden_by, reachable
from shadowkv.common.wording import one_line

_HUB_REPO, _HUB_FILE = "THUDM/LongBench", "data.zip"


@dataclass(frozen=True)
class Row:
    """One sample."""

    input: str
    context: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    words: int  # its `length` field: words or Chinese characters, not tokens
    id: str


class Rows:
    """Where rows are read from. `where` is a folder of <task>.jsonl files or a zip of them; None means the Hub."""

    def __init__(self, where: str | None, *, offline: bool = False) -> None:
        path = Path(where).expanduser() if where else hub_file(_HUB_REPO, _HUB_FILE, offline=offline)
        if not path.exists():
            raise SkvError(f"{path} does not exist; --data takes a folder of <task>.jsonl files or data.zip")
        self._from_hub = not where
        self._path = path
        self._members = _zip_members(path) if path.is_file() else None

    def has(self, name: str) -> bool:
        """Whether there are rows for a task, `hotpotqa` or `hotpotqa_e`."""
        return name in self._members if self._members is not None else (self._path / f"{name}.jsonl").is_file()

    def read(self, name: str) -> list[Row]:
        """All rows of a task, in order. Raises `SkvError` with file and line number where one is unusable."""
        where = f"{self._path}/{name}.jsonl"
        if not self.has(name):
            raise SkvError(f"{self._path} holds no {name}.jsonl")
        rows = []
        try:
            for number, raw in parse_jsonl(self._lines(name), where):
                row = _row(raw, f"{where}, line {number}")
                TASKS[name.removesuffix("_e")].check(row.answers, row.classes, f"{where}, line {number}")
                rows.append(row)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise SkvError(f"{where} is damaged: {error}") from None
        if not rows:
            raise SkvError(f"{where} is empty")
        return rows

    def described(self) -> dict[str, Any]:
        """Where rows came from, with the checksum of all there are."""
        if self._members is not None:
            sums = sha256_of(self._path)
        else:
            files = sorted(self._path.glob("*.jsonl"))
            sums = hashlib.sha256("".join(f"{f.name}{sha256_of(f)}" for f in files).encode()).hexdigest()
        return {"name": _HUB_REPO if self._from_hub else "files", "sha256": sums}

    def _lines(self, name: str) -> Iterator[bytes]:
        if self._members is None:
            with (self._path / f"{name}.jsonl").open("rb") as file:
                yield from file
            return
        with zipfile.ZipFile(self._path) as archive, archive.open(self._members[name]) as member:
            yield from member


def hub_file(repo: str, name: str, *, offline: bool = False) -> Path:
    """A file of a dataset on the Hub, downloaded once, unless `offline` or a setting forbids it."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        absent = f"the rows ({name} of {repo}) are not in the Hub cache"
    page = f"https://huggingface.co/datasets/{repo}"
    helps = f"get the file elsewhere, from {page}, and give it with --data"
    if (setting := forbidden_by(offline)) is not None:
        raise SkvError(f"{absent} and {setting} forbids fetching them; {helps}")
    if not reachable(constants.ENDPOINT):
        raise SkvError(f"{absent} and the Hub cannot be reached ({constants.ENDPOINT}); {helps}")
    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SkvError(f"{absent} and cannot be fetched: {one_line(error)}; {helps}") from error


def _zip_members(path: Path) -> dict[str, str]:
    """Task name -> member, wherever in the archive its file lies."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".jsonl") and "__MACOSX" not in name]
    except (zipfile.BadZipFile, OSError) as error:
        raise SkvError(f"{path} is not a zip file of <task>.jsonl files ({error})") from None
    if not names:
        raise SkvError(
            f"{path} holds no <task>.jsonl files; LongBench's data.zip is expected (sha256 {sha256_of(path)})"
        )
    return {name.rpartition("/")[2].removesuffix(".jsonl"): name for name in names}


def _row(raw: dict[str, Any], where: str) -> Row:
    missing = [key for key in ("input", "context", "answers", "length") if raw.get(key) is None]
    if missing:
        raise SkvError(f"{where}: '{missing[0]}' is missing")
    answers, classes = raw["answers"], raw.get("all_classes") or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers) or not any(answers):
        raise SkvError(f"{where}: 'answers' is not a list of texts with at least one that is not empty")
    if not isinstance(raw["input"], str) or not isinstance(raw["context"], str):
        raise SkvError(f"{where}: 'input' or 'context' is not a text")
    try:
        words = int(raw["length"])
    except (TypeError, ValueError, OverflowError):
        raise SkvError(f"{where}: 'length' is not a number") from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise SkvError(f"{where}: 'all_classes' is not a list of texts")
    check_text(where, raw["input"], raw["context"], *answers, *classes)
    return Row(raw["input"], raw["context"], tuple(answers), tuple(classes), words, str(raw.get("_id", "")))
