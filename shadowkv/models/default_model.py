"""The model of a command that names none: the best one that this machine can run now."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from shadowkv.models.presets import Preset, presets
from shadowkv.models.resolving import ModelSource, is_here

SMALLEST = "smollm2-135m"
_WEIGHTS_SHARE = 0.75  # of the device's memory; a quarter of it is left for keys, values and activations


class DefaultModel(NamedTuple):
    """A preset, and why it is the one."""

    name: str
    why: str


def default_model(
    memory_bytes: int | None,
    element_bytes: int,
    here: Callable[[Preset], bool] = is_here,
    known: Collection[Preset] | None = None,
) -> DefaultModel:
    """The largest preset by parameters whose weights are here and fit a GPU of `memory_bytes`; on a CPU (None), or
    where none fits, always the one that runs anywhere."""
    if memory_bytes is None:
        return DefaultModel(SMALLEST, "which a CPU runs in minutes")
    room = _WEIGHTS_SHARE * memory_bytes
    found = [preset for preset in (presets().values() if known is None else known) if here(preset)]
    sizes = {preset.name: parameters(preset) * element_bytes for preset in found}
    fitting = [name for name, size in sizes.items() if size <= room]
    gib = f"{memory_bytes / 2**30:.0f} GiB"
    if not fitting:
        return DefaultModel(SMALLEST, f"because no preset's weights are here that fit this GPU's {gib}")
    best = max(fitting, key=sizes.__getitem__)
    return DefaultModel(best, f"the largest preset whose weights are here and fit this GPU's {gib}")


def parameters(preset: Preset) -> int:
    """How many parameters a preset's architecture has."""
    from shadowkv.models.loading import load_config
    from shadowkv.models.model_size import blueprint, count_parameters

    config = load_config(ModelSource(preset.name, None, preset, "architecture"))
    return count_parameters(blueprint(config)).total
