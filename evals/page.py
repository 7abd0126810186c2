"""Runs as Markdown: tables, with what a reader must know around them."""

from __future__ import annotations

from collections.abc import Sequence

from evals.manifest import Manifest
from evals.tables import Table


def page(manifest: Manifest, tables: Sequence[Table], measured: Sequence[str] = ()) -> str:
    """Of a run folder: the run's notes above, what was `measured` to be so below."""
    session = manifest.sessions[-1]
    machine = f"{session.machine.get('gpu') or session.machine['cpu']}, {session.machine['torch_threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in session.versions.items())
    made = [*code(manifest.commands), f"{manifest.config.get('machine', machine)} · {versions}"]
    return markdown(manifest.title, manifest.notes, tables, measured, made)


def markdown(
    title: str, notes: Sequence[str], tables: Sequence[Table], remarks: Sequence[str], ending: Sequence[str] = ()
) -> str:
    """A title, notes, tables, remarks as a list, and paragraphs that end it."""
    parts = [f"# {title}", *(f"**{note}**" for note in notes), *(table.markdown() for table in tables)]
    parts += [*listed(remarks), *ending]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def code(commands: Sequence[str]) -> list[str]:
    """Commands as paragraphs."""
    return [f"`{command}`" for command in commands]


def listed(items: Sequence[str]) -> list[str]:
    """Items as one paragraph, a list; none where there are none."""
    return ["\n".join(f"- {item}" for item in items)] if items else []
