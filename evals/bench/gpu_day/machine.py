"""What is here: a card, packages, weights, texts; and what a stage lacks of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from evals.bench.gpu_day.stages import Stage

_ASKED = (
    "import json, torch; n = torch.cuda.is_available() and torch.cuda.get_device_name(); "
    "print(json.dumps([n, torch.cuda.mem_get_info()[1]] if n else None))"
)
_VENDORS = {"nvidia", "geforce", "tesla", "quadro", "amd", "instinct"}
# What a bare machine with torch and transformers may lack although no stage needs it -> who does.
LATER = MappingProxyType(
    {
        "itables": "skv report's page",
        "rouge": "LongBench",
        "gguf": "weights of skv pull, which convert once",
        "datasets": "LongBench",
        "scipy": "skv compare",
        "accelerate": "GGUF files",
    }
)


@dataclass(frozen=True)
class Card:
    """The GPU that torch would take."""

    name: str
    memory_bytes: int

    @property
    def folder(self) -> str:
        """Its name as one short word: h100, l40s, rtx4090."""
        words = [word for word in re.findall("[a-z0-9]+", self.name.lower()) if word not in _VENDORS]
        numbered = next((place for place, word in enumerate(words) if re.search(r"\d", word)), len(words) - 1)
        return "".join(words[: numbered + 1]) or "gpu-day"


def card_here() -> Card | None:
    """The card, asked for by a process of its own: one that asks keeps memory of it as long as it lives."""
    asked = subprocess.run([sys.executable, "-c", _ASKED], capture_output=True, text=True, check=False)
    found = json.loads(asked.stdout.splitlines()[-1]) if asked.returncode == 0 and asked.stdout.strip() else None
    return None if found is None else Card(*found)


@dataclass(frozen=True)
class RealModel:
    """Whose weights the stages on real text take."""

    name: str
    here: bool
    rank: int
    budget: int
    long: str  # a context that it takes


def real_model(asked: str | None, card: Card | None) -> RealModel:
    """The model asked for, or the largest preset whose weights are here and fit the card, or SmolLM2."""
    if _lacks("platformdirs"):  # without which nobody can look; stages say that they lack it
        return RealModel(asked or "smollm2-135m", False, 64, 256, "4k")
    from shadowkv.models.default_model import SMALLEST, default_model
    from shadowkv.models.presets import presets
    from shadowkv.models.resolving import is_here

    # Of the small ones only that whose layers all attend to everything.
    known = [preset for preset in presets().values() if preset.pack is None or preset.name == SMALLEST]
    name = asked or default_model(card.memory_bytes if card else None, 2, known=known).name
    preset = presets().get(name)
    if preset is None:  # a folder or a Hub id: the command itself finds out what it is
        return RealModel(name, True, 64, 256, "4k")
    long = "32k" if preset.context_tokens > 32 * 1024 else "4k"
    return RealModel(name, is_here(preset), preset.rank, preset.budget, long)


def lacking_modules(stages: Sequence[Stage]) -> Mapping[str, list[str]]:
    """Packages that are not here -> the stages that need them, or what else does."""
    asked = dict.fromkeys(module for stage in stages for module in stage.modules)
    found = {module: [stage.name for stage in stages if module in stage.modules] for module in asked if _lacks(module)}
    return found | {module: [f"no stage; {who}"] for module, who in LATER.items() if _lacks(module)}


def missing_modules(stage: Stage) -> list[str]:
    """Packages that a stage needs and that are not here."""
    return [module for module in stage.modules if _lacks(module)]


def lacks(stage: Stage, *, tiny: bool, model: RealModel | None, tests: Path) -> str:
    """What a stage cannot do without and does not have, empty if it can run. No CUDA is for `tiny` to say."""
    if tiny and not stage.tiny:
        return "needs CUDA"
    if missing := missing_modules(stage):
        return f"needs {', '.join(missing)}"
    if any("{tests}" in command for command in stage.commands) and not tests.is_dir():
        return "needs the repository's folder of tests"
    if tiny:
        return ""
    from shadowkv.models.packs import pack_path

    pulled = [name for name in stage.packs if pack_path(name) is None]
    if stage.weights and model is not None and not model.here:
        pulled.insert(0, model.name)
    return f"needs {' and '.join(pulled)}: skv pull {' '.join(pulled)}, where there is a network" if pulled else ""


def _lacks(module: str) -> bool:
    return find_spec(module) is None
