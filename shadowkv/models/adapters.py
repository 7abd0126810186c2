"""LoRA adapters: checked as files before weights are loaded, and merged into them by peft."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowkv.common.errors import SkvError
from shadowkv.common.home import sha256_of
from shadowkv.common.reading import read_text
from shadowkv.common.wording import one_line
from shadowkv.models.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, first_names

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Adapter:
    """A LoRA that can be merged. base: the model that it says it was trained on."""

    folder: Path
    name: str
    base: str
    sha256: str  # of its settings and weights


def merged(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The model with the adapter in its weights. Raises `SkvError` where it is of another model than this one."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it lacks is refused below
            made = PeftModel.from_pretrained(model, str(adapter.folder), torch_device=str(model.device))
            held: dict[str, Tensor] = get_peft_model_state_dict(made, save_embedding_layers=False)
    except Exception as error:  # there is no end to what a damaged or foreign adapter makes the library raise
        raise SkvError(f"the adapter {adapter.name} does not fit this model: {one_line(error)}") from error
    stored = _tensor_names(adapter.folder)
    wrong = {
        "holds": [name for name in stored if name not in held],
        "lacks": [name for name in held if name not in stored and not _adds_nothing(name, held, stored)],
    }
    said = [f"{verb} {len(names)} tensors, {first_names(names)}" for verb, names in wrong.items() if names]
    if said:
        raise SkvError(f"the adapter {adapter.name} is not of this model: it {' and '.join(said)}")
    whole: PreTrainedModel = made.merge_and_unload()
    return whole


def _adds_nothing(name: str, held: dict[str, Tensor], stored: set[str]) -> bool:
    """Whether this is half of a product that the files leave out whole, and whose other half is zero."""
    other = name.replace("lora_A", "lora_B")
    return other in held and other not in stored and not bool(held[other].any())


def read_adapter(folder: Path) -> Adapter:
    if not folder.is_dir():
        raise SkvError(f"--adapter {folder}: no such folder; it takes one of {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise SkvError(f"--adapter {folder} holds no {name}")
    try:
        said: Any = json.loads(read_text(folder / ADAPTER_CONFIG))
        kind, base = said["peft_type"], said.get("base_model_name_or_path")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SkvError(f"{folder / ADAPTER_CONFIG} is damaged: {one_line(error)}") from error
    if kind != "LORA":
        raise SkvError(f"--adapter {folder} is of the kind {kind}, and only a LoRA is merged")
    _tensor_names(folder)
    if importlib.util.find_spec("peft") is None:
        raise SkvError("--adapter needs peft, which merges it: pip install 'skv[adapters]'")
    sums = "".join(sha256_of(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return Adapter(folder, folder.resolve().name, str(base or "unknown"), hashlib.sha256(sums.encode()).hexdigest())


def _tensor_names(folder: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise SkvError(f"{folder / ADAPTER_WEIGHTS} is damaged: {one_line(error)}") from error
