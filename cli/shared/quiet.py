"""Libraries keep their warnings, advice and progress bars to themselves; our own lines come through.

Done once by the console script, and by each process that it starts; `--debug` leaves them as they are.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from types import MappingProxyType
from typing import TextIO

# Read by the libraries when they are imported. What a user has set stays, and processes inherit all of it.
_SETTINGS = MappingProxyType(
    {
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
)


def quieten() -> None:
    """For the rest of this process, and of those that it starts. To be called before any library is imported."""
    from shadowkv.common.errors import SkvWarning

    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.disable(logging.WARNING)  # errors come through
    warnings.filterwarnings("default", category=SkvWarning)  # after "ignore", which a process inherits
    warnings.showwarning = _show_ours


def _show_ours(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In place of `warnings.showwarning`, which libraries call whatever filters they have set."""
    from shadowkv.common.errors import SkvWarning
    from shadowkv.common.wording import plain_line

    if issubclass(category, SkvWarning):
        print(f"skv: note: {plain_line(str(message))}", file=file or sys.stderr)
