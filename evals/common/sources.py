"""Where haystacks come from, with what a reader needs to know to get the same text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from evals.common.jsonl import check_text
from evals.common.seeding import seeded
from shadowkv.common.errors import SkvError
from shadowkv.common.reading import read_text
from shadowkv.models.packs import pack_manifest, pack_path

_MIN_WORDS = 200
_SYNTHETIC_SENTENCES = 20_000


@dataclass(frozen=True)
class Haystack:
    """One copy of a haystack's text; tasks repeat it where they need more."""

    text: str
    name: str
    version: str
    sha256: str
    comparable: bool  # whether scores can be held against published ones


def haystack(spec: str) -> Haystack:
    """`essays` (pulled), `synthetic` (our own seeded prose), or a .txt, .json or .jsonl file with `text` fields."""
    if spec == "essays":
        return _essays()
    if spec == "synthetic":
        return _made("synthetic", "1", _synthetic(), comparable=False)
    return _from_file(Path(spec).expanduser())


def essays_folder() -> Path:
    """The pulled essays; raises `SkvError` naming the command that pulls them."""
    folder = pack_path("essays")
    if folder is None:
        raise SkvError("the essays are not pulled; run 'skv pull essays' or use --haystack synthetic")
    return folder


def _essays() -> Haystack:
    files = sorted(essays_folder().glob("*.txt"))
    text = "\n\n".join(" ".join(path.read_text(encoding="utf-8").split()) for path in files)
    wheels = pack_manifest("essays")["wheels"]
    assert isinstance(wheels, list)
    return _made("essays", f"{wheels[0]['name']} {wheels[0]['version']}", text, comparable=True)


def _from_file(path: Path) -> Haystack:
    try:
        raw = read_text(path, f"haystack {path}")
    except OSError as error:
        hint = "" if path.suffix else "; --haystack takes essays, synthetic or a file"
        raise SkvError(f"haystack {path} cannot be read: {error.strerror}{hint}") from None
    try:
        if path.suffix == ".jsonl":
            raw = "\n\n".join(json.loads(line)["text"] for line in raw.split("\n") if line.strip())
        elif path.suffix == ".json":
            loaded = json.loads(raw)
            rows = loaded if isinstance(loaded, list) else [loaded]
            raw = "\n\n".join(row["text"] if isinstance(row, dict) else row for row in rows)
    except (ValueError, KeyError, TypeError):
        raise SkvError(f"haystack {path} is not JSON with a 'text' field in every row") from None
    check_text(f"haystack {path}", raw)
    return _made(path.name, "file", raw, comparable=False)


def _made(name: str, version: str, text: str, *, comparable: bool) -> Haystack:
    words = len(text.split())
    if words < _MIN_WORDS:
        raise SkvError(f"haystack {name} is too short: {words} words, at least {_MIN_WORDS} are needed")
    return Haystack(text, name, version, hashlib.sha256(text.encode()).hexdigest(), comparable)


_WHO = (
    "the ferryman,a retired surveyor,the youngest archivist,my neighbour,the night baker,a travelling botanist,"
    "the harbour clerk,an old cartographer,the piano tuner,a patient gardener,the lighthouse keeper,"
    "the glassblower,a schoolteacher,the village doctor,the orchard owner,a weary translator,the bridge engineer,"
    "the town printer"
).split(",")
_DID = (
    "described,repaired,forgot,collected,measured,painted,borrowed,catalogued,sold,remembered,rebuilt,examined,"
    "carried home,photographed,argued about,wrote down,inherited,lost,praised,studied"
).split(",")
_WHAT = (
    "a brass telescope,the flooded cellar,three crates of apples,an unsigned letter,the broken clock,"
    "a map of the marshes,the copper kettle,a box of seeds,the oldest ledger,a pair of snowshoes,the stone wall,"
    "a jar of blue pigment,the wooden pier,a bundle of receipts,the abandoned mill,a tide table,the choir loft,"
    "an engraved spoon,the attic window,a recipe for rye bread"
).split(",")
_WHEN = (
    "before the first frost,after the market closed,during the long drought,on a quiet morning,"
    "while the rain lasted,in the year of the comet,late in the evening,at the end of summer,"
    "when the road was blocked,without telling anyone,with great care,between two storms,as the bells rang,"
    "on the way to the station"
).split(",")
_WHY = (
    "because nobody else would,although it took all week,and never regretted it,"
    "so that the children could see it,which surprised the whole street,for reasons that stayed unclear,"
    "and spoke of it for years,since the harvest had been poor,but kept the best part secret,"
    "and asked for nothing in return"
).split(",")


def _synthetic() -> str:
    """Plain prose from a small grammar of our own; always the same text, whatever the run's seed."""
    rng = seeded("synthetic haystack", 1)
    sentences = []
    for number in range(_SYNTHETIC_SENTENCES):
        who = rng.choice(_WHO)
        parts = [who[0].upper() + who[1:], rng.choice(_DID), rng.choice(_WHAT), rng.choice(_WHEN)]
        if rng.random() < 0.5:
            parts.append(rng.choice(_WHY))
        end = ".\n\n" if number % 9 == 8 else ". "
        sentences.append(" ".join(parts) + end)
    return "".join(sentences).strip()
