"""Named hyper-parameters: what methods and prefills have in common, and how they are spelled."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from shadowkv.common.errors import SkvError


@dataclass(frozen=True)
class Setting:
    """Named hyper-parameters and nothing else."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    # "owner/repository@revision, date: what agreed", as `tests/fidelity/` holds it to; None is not compared.
    compared: ClassVar[str | None] = None

    def params(self) -> dict[str, Any]:
        """Every hyper-parameter with its value."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def files(self) -> dict[str, Path]:
        """Files that parameters name, by parameter: their contents are part of the setting."""
        return {}

    def notes(self) -> list[str]:
        """What every report must say of this setting beyond its label, a line each."""
        return []

    @property
    def label(self) -> str:
        """Canonical spelling: the name and what differs from the defaults, sorted; `parse_method` reads it."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        listed = ",".join(f"{key}={format_value(value)}" for key, value in sorted(changed.items()))
        return f"{self.name}:{listed}" if listed else self.name


def format_value(value: object) -> str:
    """How a parameter's value is spelled in a label."""
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def require(condition: bool, message: str) -> None:
    """Raise `SkvError(message)` unless `condition` holds: the guard of a method's parameters."""
    if not condition:
        raise SkvError(message)
