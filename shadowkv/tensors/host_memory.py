"""How much of the host's memory there is to take."""

from __future__ import annotations

import os
from pathlib import Path

from shadowkv.common.errors import SkvError

HOST_RESERVE = 0.05  # left to the system and to other processes


def available_host_bytes() -> int:
    """Host memory that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def require_host_bytes(needed: int, what: str) -> None:
    """Raise `SkvError` if that much would leave the host short: said before anything is taken."""
    free = available_host_bytes()
    if needed > (1 - HOST_RESERVE) * free:
        raise SkvError(
            f"{what} would keep {needed / 2**30:.1f} GiB on the host, where {free / 2**30:.1f} GiB are free: "
            "values=int8 takes half, offload=none keeps them on the device"
        )
