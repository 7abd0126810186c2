"""`--fail-on`: which metrics can fail a build, and how large a change counts as one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean

ACCURACY, FIDELITY, THROUGHPUT, MEMORY = "accuracy", "fidelity", "throughput", "memory"
TOLERANCES: Mapping[str, float] = MappingProxyType({ACCURACY: 0.02, FIDELITY: 0.05, THROUGHPUT: 0.05, MEMORY: 0.01})
_NOTHING = "nothing"


@dataclass(frozen=True)
class Gate:
    """Tolerances of all metrics, and those metrics whose `worse` fails. Accuracy in points of 1, others as shares."""

    tolerances: Mapping[str, float]
    failing: frozenset[str]

    def check(self, measured: Collection[str]) -> None:
        """Raise `SkvError` where nothing that is to fail is measured: such a gate would pass whatever happened."""
        if self.failing and not self.failing.intersection(measured):
            raise SkvError(f"--fail-on {', '.join(sorted(self.failing))}: these runs measure {', '.join(measured)}")


def parse_gate(specs: Sequence[str]) -> Gate:
    """Read `accuracy=0.02`, `throughput=5%`, `memory`; none at all is every metric at its default, `nothing` none.

    Raises `SkvError` on an unknown metric, a repeated one, or a tolerance that is not above 0 and below 1.
    """
    if not specs:
        return Gate(TOLERANCES, frozenset(TOLERANCES))
    if _NOTHING in specs:
        if len(specs) > 1:
            raise SkvError(f"--fail-on {_NOTHING} contradicts the others")
        return Gate(TOLERANCES, frozenset())
    asked: dict[str, float] = {}
    for spec in specs:
        metric, given, value = spec.strip().partition("=")
        if metric not in TOLERANCES:
            known = [*TOLERANCES, _NOTHING]
            raise SkvError(f"unknown metric '{metric}'{did_you_mean(metric, known)}; one of {', '.join(known)}")
        if metric in asked:
            raise SkvError(f"--fail-on {metric} is given twice")
        asked[metric] = _tolerance(spec, value) if given else TOLERANCES[metric]
    return Gate({**TOLERANCES, **asked}, frozenset(asked))


def _tolerance(spec: str, value: str) -> float:
    try:
        tolerance = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        tolerance = 0.0
    if not 0 < tolerance < 1:
        raise SkvError(f"--fail-on {spec}: write a tolerance above 0 and below 1, such as 0.02 or 2%")
    return tolerance
