"""GPUs that can be planned for: what their data sheets promise, and which share of it decoding reaches.

Memory is what the driver leaves to programs (`torch.cuda.mem_get_info`), a little less than the data sheet's number.
Bandwidth, link (PCIe x16, one direction) and dense bf16 FLOP/s are the data sheets'.

Shares of the peaks and the overhead of a layer are explicit, because they decide every predicted time:
- A100-80G: fitted to the 22 decode throughputs that ShadowKV's authors published (1600 GB/s, 23.3 GB/s, 0.45 ms; the
  figures are in tests/published_throughput.py). The share of the memory is the one in which their batch sizes fit.
- H200: assumed, until it is measured: 3840 GB/s, twice the A100's link at the same share, 0.30 ms on a newer host.
- All others borrow from the one of these two that has their PCIe generation, and with it their kind of host.
The share of FLOP/s is assumed everywhere; decoding at long contexts hardly ever needs it.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean
from shadowkv.common.reading import read_text
from shadowkv.common.sizes import parse_bytes
from shadowkv.common.wording import one_line

_GIB = 2**30
_FILES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class GPU:
    """Peaks, and what is reached of them."""

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    link_bytes_per_s: float
    flop_per_s: float
    memory_share: float = 0.96
    bandwidth_share: float = 1600 / 2039
    link_share: float = 23.3 / 32
    flop_share: float = 0.6
    layer_overhead_ms: float = 0.45  # launching one layer's kernels from Python
    source: str = "shares of the a100-80g"

    @property
    def usable_bytes(self) -> int:
        """Memory for weights and caches; the rest is the context's, the allocator's and the activations'."""
        return int(self.memory_bytes * self.memory_share)

    @property
    def achieved(self) -> Rates:
        """What decoding gets."""
        return Rates(
            self.bandwidth_bytes_per_s * self.bandwidth_share,
            self.link_bytes_per_s * self.link_share,
            self.flop_per_s * self.flop_share,
        )


class Rates(NamedTuple):
    """Of device memory, of the link to the host, and of arithmetic, all per second."""

    bandwidth_bytes: float
    link_bytes: float
    flop: float


_PCIE5: dict[str, Any] = {
    "bandwidth_share": 3840 / 4800,
    "link_share": 46.6 / 64,
    "layer_overhead_ms": 0.30,
    "source": "shares of the H200, which are assumed",
}

# fmt: off
_GPUS = [
    #   name         memory              bandwidth link    dense bf16
    GPU("a100-40g",  int(39.50 * _GIB),  1555e9,   32e9,   312e12),
    GPU("a100-80g",  int(79.25 * _GIB),  2039e9,   32e9,   312e12, source="fitted to the table of ShadowKV's authors"),
    GPU("h100-80g",  int(79.11 * _GIB),  3350e9,   64e9,   989e12, **_PCIE5),
    GPU("h200",      int(139.80 * _GIB), 4800e9,   64e9,   989e12, **_PCIE5 | {"source": "assumed shares"}),
    GPU("b200",      int(178.35 * _GIB), 7700e9,   64e9,  2250e12, **_PCIE5),
    GPU("l40s",      int(44.40 * _GIB),  864e9,    32e9,   362e12),
    GPU("a10g",      int(22.06 * _GIB),  600e9,    32e9,    70e12),
    GPU("l4",        int(22.03 * _GIB),  300e9,    32e9,   121e12),
    GPU("rtx3090",   int(23.68 * _GIB),  936e9,    32e9,    71e12),
    GPU("rtx4090",   int(23.64 * _GIB),  1008e9,   32e9,   165e12),
    GPU("rtx5090",   int(31.37 * _GIB),  1792e9,   64e9,   209e12, **_PCIE5),
]
# fmt: on


def gpus() -> dict[str, GPU]:
    """Every GPU of the table by name."""
    return {gpu.name: gpu for gpu in _GPUS}


# What torch calls the cards of the table. Others of the same family (PCIe, NVL, Ti, laptops, slices of one) have other
# rates, and are none of them.
_CALLED = {
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-PCIE-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA H100 80GB HBM3": "h100-80g",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA A10G": "a10g",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
}


def gpu_called(device_name: str) -> GPU | None:
    """The GPU of the table that torch calls this, if there is one."""
    name = _CALLED.get(device_name)
    return None if name is None else gpus()[name]


def find_gpu(name: str) -> GPU:
    """The GPU called `name`, or the one that a JSON or YAML file of that name describes.

    Raises `SkvError` on an unknown name, with the nearest one, and on a file that describes none.
    """
    if Path(name).suffix.lower() in _FILES:
        return _read(Path(name).expanduser())
    known = gpus()
    if name.lower() not in known:
        raise SkvError(
            f"unknown GPU '{name}'{did_you_mean(name, known)}; GPUs: {', '.join(known)}, or a .json or .yaml file"
        )
    return known[name.lower()]


def _read(path: Path) -> GPU:
    try:
        text = read_text(path)
        said = json.loads(text) if path.suffix.lower() == ".json" else _yaml(text)
    except OSError as error:
        raise SkvError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise SkvError(f"{path} is not valid {path.suffix[1:].upper()}: {one_line(error)}") from error
    if not isinstance(said, dict):
        raise SkvError(f"{path} does not describe a GPU: it holds no fields such as memory_bytes")
    known = {f.name: f for f in fields(GPU)}
    for key in said:
        if key not in known:
            raise SkvError(f"{path}: unknown field '{key}'{did_you_mean(str(key), known)}; fields: {', '.join(known)}")
    values = {"name": path.stem, "source": f"as {path.name} says"} | {
        key: _value(key, value, path) for key, value in said.items()
    }
    missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
    if missing:
        raise SkvError(f"{path} lacks {', '.join(missing)}")
    return GPU(**values)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _value(key: str, value: Any, path: Path) -> Any:
    """One field's value, checked. Numbers may be texts with a unit (24GB) and, as YAML reads 1e12, without."""
    if key in ("name", "source"):
        return str(value)
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = parse_bytes(value, f"{path}: {key}")
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
        raise SkvError(f"{path}: {key}={value} is not a positive number")
    if number == 0 and key != "layer_overhead_ms":
        raise SkvError(f"{path}: {key} must be larger than 0")
    if key.endswith("_share") and number > 1:
        raise SkvError(f"{path}: {key}={value} is not a share between 0 and 1")
    return int(number) if key == "memory_bytes" else float(number)
