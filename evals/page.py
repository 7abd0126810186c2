"""The Markdown page of a run folder."""

from __future__ import annotations

from collections.abc import Sequence

from evals.manifest import Manifest
from evals.tables import Table


def heading(manifest: Manifest) -> str:
    """One line that says what was run on what."""
    model = manifest.model
    return f"{manifest.benchmark} · {model['name']} · {model['dtype']} on {model['device']}"


def page(title: str, manifest: Manifest, tables: Sequence[Table], measured: Sequence[str] = ()) -> str:
    """Tables with what a reader must know: the run's notes above, what was `measured` to be so below them."""
    session = manifest.sessions[-1]
    machine = f"{session.machine.get('gpu') or session.machine['cpu']}, {session.machine['torch_threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in session.versions.items())
    commands = dict.fromkeys(session.command for session in manifest.sessions)
    parts = [f"# {title}", *(f"**{note}**" for note in manifest.notes), *(table.markdown() for table in tables)]
    parts += ["\n".join(f"- {note}" for note in measured)] if measured else []
    parts += [*(f"`{command}`" for command in commands), f"{manifest.config.get('machine', machine)} · {versions}"]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
