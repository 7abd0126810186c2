"""What a method learns about a model once, from a text: a tensor per layer, as safetensors under `$SKV_HOME`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shadowkv.common.errors import SkvError
from shadowkv.common.home import skv_home

_LAYER = "layer."
UNKNOWN = "unknown"  # instead of the checksum of weights that have none


class Calibration(NamedTuple):
    """What was learned: a tensor per layer number, and what is to be said of it."""

    layers: dict[int, Tensor]
    about: dict[str, str]


def calibration_file(method: str, name: str) -> Path:
    """Where a calibration is: `name` is a .safetensors file, or what `skv calibrate` was told to call it."""
    path = Path(name).expanduser()
    return path if path.suffix == ".safetensors" else skv_home() / "calibrations" / f"{method}-{name}.safetensors"


def save_calibration(path: Path, layers: Mapping[int, Tensor], about: Mapping[str, str]) -> None:
    """Write one tensor per layer number, with what they were made from; the file is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        save_file({f"{_LAYER}{n}": x.contiguous() for n, x in layers.items()}, made, dict(about))
        os.replace(made, path)


def load_calibration(method: str, name: str) -> dict[int, Tensor]:
    """One tensor per layer number. Raises `SkvError` where there is no such calibration."""
    path = calibration_file(method, name)
    if not path.is_file():
        raise SkvError(f"{method}: no calibration '{name}'; make it with: skv calibrate {method} --model MODEL")
    try:
        return {int(key.removeprefix(_LAYER)): x for key, x in load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise SkvError(f"{method}: {path} is not a calibration: {error}") from None
