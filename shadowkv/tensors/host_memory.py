"""How much of the host's memory there is to take."""

from __future__ import annotations

import os
from pathlib import Path

from shadowkv.common.errors import SkvError
from shadowkv.common.sizes import parse_bytes

HOST_RESERVE = 0.05  # left to the system and to other processes
_MEMINFO = Path("/proc/meminfo")
_TOLD = "SKV_HOST_MEMORY"


def available_host_bytes() -> int:
    """Host memory that can be had without swapping.

    `SKV_HOST_MEMORY` says how much the host will have in all, where a virtual machine is given more as it takes it.
    """
    total, free = _read()
    told = os.environ.get(_TOLD)
    return max(free, parse_bytes(told, _TOLD) - (total - free)) if told else free


def require_host_bytes(needed: int, what: str) -> None:
    """Raise `SkvError` if that much would leave the host short: said before anything is taken."""
    free = available_host_bytes()
    if needed > (1 - HOST_RESERVE) * free:
        raise SkvError(
            f"{what} would keep {needed / 2**30:.1f} GiB on the host, where {free / 2**30:.1f} of "
            f"{_read()[0] / 2**30:.1f} GiB are free: values=int8 takes half, offload=none keeps them on the device"
        )


def _read() -> tuple[int, int]:
    """Bytes in all, and those that can be had."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError):
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    return total, free
