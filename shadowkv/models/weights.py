"""What a folder's weight files hold, held against what a model of its config.json has and what was loaded of them."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowkv.common.errors import SkvError
from shadowkv.common.wording import one_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Tables that old checkpoints hold and every model computes for itself.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.(\w+_)?(inv_freq|cos_cached|sin_cached)|position_ids|masked_bias)$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SHOWN = 3


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads of a folder, and none beside them."""
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    index = folder / _INDEX
    if not index.is_file():
        return [path for path in sorted(folder.glob("*.safetensors")) if path.name not in _ADAPTER_FILES]
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(folder / str(shard) for shard in shards)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SkvError(f"{index} is damaged: {one_line(error)}") from error


def tensor_names(folder: Path) -> list[str]:
    """Names of all tensors that the weight files hold. Raises `SkvError` naming a file that is damaged or no such."""
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder)
    if not files and (folder / ADAPTER_CONFIG).is_file():
        raise only_an_adapter(folder)
    if not files:
        raise SkvError(f"{folder.name} holds no safetensors weights; other formats can run code and are not loaded")
    names: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                names += opened.keys()
        except (SafetensorError, OSError) as error:
            raise SkvError(f"{path.name} is damaged: {one_line(error)}") from error
    return names


def only_an_adapter(folder: Path) -> SkvError:
    """What to say of a folder that holds an adapter and no model."""
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError, OSError):
        base = None
    return SkvError(f"{folder} holds only an adapter: --model {base or 'BASE'} --adapter {folder} merges it")


def stray_files(folder: Path, adapter: Path | None) -> list[str]:
    """Files beside the weights that hold, or may hold, others: an adapter that is not asked for, shards of no index.

    Weights of other names, such as Mistral's consolidated.safetensors, are the same ones for other programs.
    """
    used = {path.name for path in weight_files(folder)}
    beside = [path.name for path in sorted(folder.glob("model*.safetensors")) if path.name not in used]
    if adapter is not None and adapter.resolve() == folder.resolve():
        return beside
    return [*beside, *(name for name in _ADAPTER_FILES if (folder / name).is_file())]


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """The folder, or links to all of it but an adapter, which transformers loads by itself where peft is installed."""
    if not any((folder / name).is_file() for name in _ADAPTER_FILES):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        linked = Path(scratch) / folder.resolve().name
        linked.mkdir()
        for path in folder.iterdir():
            if path.name not in _ADAPTER_FILES:
                (linked / path.name).symlink_to(path.resolve())
        yield linked


def unexpected_tensors(model: PreTrainedModel, reported: Iterable[str], names: Iterable[str]) -> list[str]:
    """Tensors of the files that the model was not given, out of all `names` and those that transformers `reported`.

    Its own report leaves out what a class declares to be no part of it. Causal masks and the layers of a draft head
    are not; a layer elsewhere beyond the last one is, whatever its number.
    """
    text = model.config.get_text_config()
    draft = max(int(getattr(text, "num_nextn_predict_layers", 0) or 0), 1)
    declared = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    beyond = [
        name
        for name in names
        if (layer := _LAYER.search(name)) is not None
        and int(layer[1]) >= text.num_hidden_layers + draft
        and any(pattern.search(name) for pattern in declared)
    ]
    return sorted({name for name in [*reported, *beyond] if not _COMPUTED.search(name)})


def not_loaded(name: str, folder: Path, unexpected: Collection[str], allowed: Collection[str]) -> tuple[str, ...]:
    """What of the files is left aside because it was allowed to be. Raises `SkvError` for anything else.

    allowed: glob patterns.
    """
    left = [each for each in unexpected if not any(fnmatchcase(each, pattern) for pattern in allowed)]
    adapter = [each for each in left if each in _ADAPTER_FILES]
    if adapter:
        raise SkvError(
            f"{name} holds an adapter beside its weights ({adapter[0]}): --adapter {folder} merges it, "
            "--allow-unexpected-weights 'adapter*' judges the weights without it"
        )
    if left:
        counted = f"{len(left)} tensor{'s' * (len(left) > 1)} that a model of its config.json does not have"
        if all(each.endswith(".safetensors") for each in left):
            counted = f"{len(left)} weight file{'s' * (len(left) > 1)} that would not be loaded"
        raise SkvError(
            f"{name} holds {counted}, {first_names(left)}: scores would be another model's; "
            "--allow-unexpected-weights PATTERN judges it without those that are named"
        )
    return tuple(unexpected)


def first_names(names: Collection[str]) -> str:
    """A few of many names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more


def check_weights_loaded(model: PreTrainedModel, folder: Path) -> None:
    """Raise `SkvError`, naming the tensor, where a model is not what its files say: a quick look at every tensor.

    All parameters of a model of this config must be there, and the first and last row of each must be the file's, cast
    to the model's type. What has no counterpart by name is passed over: weights that transformers converts (fused
    experts), packed and quantised ones. Not for a model that an adapter was merged into, whose weights are others.
    """
    from safetensors import safe_open

    held: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    if getattr(model, "hf_quantizer", None) is None and (lacking := sorted(_parameters_of(model) - held.keys())):
        raise SkvError(f"the model lacks {len(lacking)} of its parameters, {lacking[0]} first")
    # Renamed and rebuilt weights may bear another's name.
    converted = [
        re.compile(pattern)
        for conversion in getattr(model, "_weight_conversions", None) or ()
        for pattern in conversion.source_patterns
    ]
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                tensor = _named(held, name, model.base_model_prefix)
                if tensor is not None and not any(pattern.search(name) for pattern in converted):
                    _check_rows(name, opened.get_slice(name), tensor)


def _parameters_of(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that a new model of this config has."""
    import torch

    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    return {name for name, _ in fresh.named_parameters(remove_duplicate=False)}


def _named(held: dict[str, Tensor], name: str, prefix: str) -> Tensor | None:
    """The model's tensor of this name; files of a bare decoder name it without the prefix, or the other way round."""
    return next((held[n] for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in held), None)


def _check_rows(name: str, stored: Any, tensor: Tensor) -> None:
    import torch

    shape = stored.get_shape()
    if list(tensor.shape) != shape or tensor.device.type == "meta":
        return
    for end in (0, -1):
        leading = tuple(slice(size + end if end else 0, None if end else 1) for size in shape[:-1])
        row = stored[(*leading, slice(None))] if shape else stored[...]
        # One byte per number is a quantised weight, whose scale is elsewhere.
        if not row.is_floating_point() or row.element_size() < 2 or not tensor.is_floating_point():
            return
        mine = (tensor[(*leading, slice(None))] if shape else tensor).cpu()
        if not torch.equal(mine.nan_to_num(), row.to(tensor.dtype).nan_to_num()):
            raise SkvError(f"the model's {name} is not the one that its files hold")
