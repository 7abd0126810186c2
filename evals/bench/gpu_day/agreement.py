"""Do two engines of a method give the same answers? Of one accuracy run that holds both."""

from __future__ import annotations

import re
from pathlib import Path

LEAST_ALIKE = 0.9  # share of tokens: in 16 bits a near tie may turn, and what follows it with it
_ENGINE = re.compile(r",?engine=(fast|reference)")


def engines_agree(folder: Path) -> tuple[bool, str]:
    """Whether no answer is lost by `engine=fast` and nearly all of its tokens are the reference's, and a line on it."""
    from evals.runs.results import read_run

    _, records = read_run(folder / "run")
    answers: dict[str, dict[str, dict[tuple[int, str], tuple[list[int], float]]]] = {}
    for record in records:
        engine = _ENGINE.search(record.method)
        if engine is None or record.status != "ok" or record.score is None:
            continue
        method = _ENGINE.sub("", record.method).rstrip(":").replace(":,", ":")
        by_engine = answers.setdefault(method, {})
        of_engine = by_engine.setdefault(engine[1], {})
        of_engine[record.length, record.sample] = (list(record.tokens), record.score)
    ok, said = bool(answers), []
    for method, by_engine in answers.items():
        fast, reference = by_engine.get("fast", {}), by_engine.get("reference", {})
        both = [(fast[key], reference[key]) for key in fast.keys() & reference.keys()]
        alike = sum(a == b for (mine, _), (theirs, _) in both for a, b in zip(mine, theirs, strict=False))
        total = sum(max(len(mine), len(theirs)) for (mine, _), (theirs, _) in both)
        lost = sum(mine < theirs for (_, mine), (_, theirs) in both)
        missing = len(reference.keys() ^ fast.keys())
        ok = ok and total > 0 and alike >= LEAST_ALIKE * total and not lost and not missing
        parts = [f"{alike}/{total} tokens alike"] if total else ["nothing to compare"]
        parts += [f"{lost} answers lost"] * bool(lost) + [f"{missing} answers missing"] * bool(missing and total)
        said.append(f"{method}: {', '.join(parts)}")
    return ok, "; ".join(said) or "no answers of two engines"
