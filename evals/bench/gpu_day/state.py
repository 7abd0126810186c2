"""What is known of a day's stages: one JSON file, written after every command, by which the day goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shadowkv.common.errors import SkvError

FILE = "gpu-day.json"
DONE, FAILED, CUT, SKIPPED = "done", "failed", "cut off", "skipped"


@dataclass
class Ran:
    """A command, its exit code and the seconds it took."""

    words: list[str]
    code: int
    seconds: float


@dataclass
class Entry:
    """What became of a stage. `before`: it was done by an earlier call, which is not kept."""

    name: str
    status: str
    said: str = ""
    machine: str = ""
    started: str = ""
    ran: list[Ran] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    before: bool = False

    @property
    def seconds(self) -> float:
        return sum(ran.seconds for ran in self.ran)

    def done_of(self, machine: str, commands: Sequence[Sequence[str]]) -> list[Ran]:
        """Those of these commands that it has done, on the same machine: they need not be run again."""
        if self.machine != machine:
            return []
        wanted = [list(words) for words in commands]
        return [ran for ran in self.ran if ran.code == 0 and ran.words in wanted]


def read_state(out: Path) -> dict[str, Entry]:
    """Entries by stage, none where no day was begun. Raises `SkvError` on a file that is not one."""
    file = out / FILE
    if not file.is_file():
        return {}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))["stages"]
        entries = [Entry(**{**said, "ran": [Ran(**ran) for ran in said["ran"]]}) for said in kept]
    except (ValueError, KeyError, TypeError) as error:
        raise SkvError(f"{file} is damaged; delete it, or choose another --out: run folders stay and go on") from error
    return {entry.name: entry for entry in entries}


def write_state(out: Path, entries: Sequence[Entry], **more: Any) -> Path:
    """Write all at once: a reader finds the old file or the new one."""
    file = out / FILE
    told = {**more, "stages": [{k: v for k, v in asdict(entry).items() if k != "before"} for entry in entries]}
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, file)
    return file
