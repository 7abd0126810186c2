"""Into how many pieces a step divides a batch, so that the bus has one's values to carry while others compute.

A piece's values should take the bus for about as long as choosing those of the next one, most of which is not bytes but
kernels that take their time whatever the batch; two pieces pay nearly always. The figures are from the simulated clock
of `shadowkv.planning.schedule` for PCIe 5, and tests/test_schedule.py says how far they are from the best ones there.
"""

from __future__ import annotations

_PIECE_BYTES = 5e6
_MOST_PIECES = 4  # each costs launches, and more of them pay little
_ROWS_FOR_TWO = 6


def pieces(batch: int, fetched_bytes: float) -> int:
    """fetched_bytes: what crosses the bus for one row in one layer; without any there is nothing to divide for."""
    if not fetched_bytes:
        return 1
    least = 2 if batch >= _ROWS_FOR_TWO else 1
    return max(least, min(batch, _MOST_PIECES, round(batch * fetched_bytes / _PIECE_BYTES)))
