"""`--model`: a preset, a local folder, a Hub id or a .gguf file -> where its files are.

What is on this machine is used without any network attempt. A Hub id that is not cached is downloaded, unless a
setting forbids it or the Hub cannot be reached, which is found out in seconds and said in one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean
from shadowkv.common.online import forbidden_by, reachable
from shadowkv.common.wording import one_line
from shadowkv.models.adapters import Adapter, read_adapter
from shadowkv.models.packs import converted, pack_path
from shadowkv.models.presets import Preset, presets
from shadowkv.models.weights import ADAPTER_CONFIG, only_an_adapter

# Told before a model is downloaded: its Hub id, and the folder that fills.
OnDownload = Callable[[str, Path], None]


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are: a folder, or none for a dummy whose architecture comes from its preset."""

    name: str
    folder: Path | None
    preset: Preset | None
    described: str
    adapter: Adapter | None = None  # to be merged into the weights


def resolve(
    name: str,
    *,
    dummy: bool = False,
    config_only: bool = False,
    offline: bool = False,
    instead: str = "",
    on_download: OnDownload = lambda hub_id, folder: None,
) -> ModelSource:
    """What `--model name` means here and now; raises `SkvError` if its files cannot be had.

    `config_only` asks for no weights, and takes a preset's architecture where its files are not on this machine.
    `offline` forbids to download. `instead`: what else the command could be told, for the message of that error.
    """
    preset = presets().get(name)
    path = Path(name).expanduser()
    if preset is None and path.suffix == ".gguf":
        if not path.is_file():
            raise SkvError(f"{name}: no such file")
        return ModelSource(path.stem, converted(path), None, f"GGUF file {path.name}")
    if preset is None and path.is_dir():
        if not (path / "config.json").is_file():
            if (path / ADAPTER_CONFIG).is_file():
                raise only_an_adapter(path)
            raise SkvError(f"{name} is not a model folder: it holds no config.json")
        return ModelSource(path.resolve().name, path, None, f"folder {path.name}")
    if preset is None and ("/" not in name or name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise SkvError(
            f"unknown model '{name}'{did_you_mean(name, presets())}; give a preset ({', '.join(presets())}), "
            "a folder, a Hub id or a .gguf file"
        )
    if preset is not None and preset.pack is not None and (folder := pack_path(preset.pack)) is not None:
        return ModelSource(name, folder, preset, f"pack {preset.pack}")
    hub_id = preset.hub_id if preset is not None else name
    cached = _cached(hub_id, config_only)
    if cached is not None:
        return ModelSource(name, cached, preset, f"Hub {hub_id}@{cached.name[:12]}")
    if (dummy or config_only) and preset is not None:
        return ModelSource(name, None, preset, f"architecture of {hub_id}")
    _require_hub(hub_id, preset, offline, instead)
    on_download(hub_id, _cache_of(hub_id))
    return ModelSource(name, _downloaded(hub_id, preset, config_only, instead), preset, f"Hub {hub_id}")


def with_adapter(source: ModelSource, where: Path | None) -> ModelSource:
    """The model with the adapter of a folder, which makes it another model. Raises `SkvError` if that is not one."""
    if where is None:
        return source
    adapter = read_adapter(where.expanduser())
    return replace(source, name=f"{source.name}+{adapter.name}", adapter=adapter)


def is_here(preset: Preset) -> bool:
    """Whether a preset's weights are on this machine: pulled, or complete in the Hub's cache."""
    pulled = preset.pack is not None and pack_path(preset.pack) is not None
    return pulled or _cached(preset.hub_id, config_only=False) is not None


def _cached(hub_id: str, config_only: bool) -> Path | None:
    """The snapshot of a model in the local Hub cache, if what is asked for is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
    there = (folder / "config.json").is_file() if config_only else _complete(folder)
    return folder if there else None


def _complete(folder: Path) -> bool:
    """Whether config and all weights are there: an interrupted download leaves the files that it finished."""
    index = folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        return False
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise SkvError(f"{index} is damaged; delete it to download it again") from error
    return all((folder / shard).is_file() for shard in shards)


def _require_hub(hub_id: str, preset: Preset | None, offline: bool, instead: str) -> None:
    """Raise `SkvError`, with what was tried and what helps, where nothing can be downloaded."""
    from huggingface_hub import constants

    if (setting := forbidden_by(offline)) is not None:
        raise SkvError(f"{_absent(hub_id)} and {setting} forbids downloading it; {_helps(preset, instead)}")
    if not reachable(constants.ENDPOINT):
        tried = f"the Hub cannot be reached ({constants.ENDPOINT})"
        raise SkvError(f"{_absent(hub_id)} and {tried}; {_helps(preset, instead)}")


def _downloaded(hub_id: str, preset: Preset | None, config_only: bool, instead: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = ["config.json", "*.py"]
        if not config_only:
            wanted += ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # the Hub client's HTTP library, and so its exceptions, differ between its versions
        tried = f"cannot be downloaded: {one_line(error)}"
        raise SkvError(f"{_absent(hub_id)} and {tried}; {_helps(preset, instead)}") from error


def _absent(hub_id: str) -> str:
    from huggingface_hub import constants

    return f"{hub_id} is not on this machine (looked in the Hub cache, {constants.HF_HUB_CACHE})"


def _cache_of(hub_id: str) -> Path:
    """The folder of the Hub's cache that holds a model."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model")


def _helps(preset: Preset | None, instead: str) -> str:
    """What gets a model that is not here, or does without it."""
    if preset is None:
        return "give --model PATH of a local folder" + instead
    if preset.pack is not None:
        return f"run 'skv pull {preset.pack}' or give --model PATH" + instead
    page = f"https://huggingface.co/{preset.hub_id}"
    gate = f"it is gated: accept its licence on {page}, then run 'hf auth login' or set HF_TOKEN; or " * preset.gated
    return f"{gate}give --model PATH of a local folder, ask 'skv plan --model {preset.name}'{instead}"
