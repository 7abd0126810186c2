"""Where skv keeps its files, and the checksums by which it knows them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import platformdirs


def skv_home() -> Path:
    """`$SKV_HOME`, or the platform's cache folder: packs, converted models, calibrations, self-checks."""
    return Path(os.environ.get("SKV_HOME") or platformdirs.user_cache_dir("skv")).expanduser()


def sha256_of(path: Path) -> str:
    """Checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
