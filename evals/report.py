"""Tables and pictures, always rebuildable from run.json and samples.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from evals.manifest import Manifest
from evals.results import Record, read_run

_REFERENCE = "full"


@dataclass(frozen=True)
class Row:
    """One method at one length. Unscored answers are counted, and left out of every mean."""

    method: str
    length: int
    score: float | None  # mean over scored answers, 0..1
    scored: int
    total: int
    agreement: float | None  # share of tokens 2..n equal to full attention's, mean over examples
    device_bytes: float | None
    host_bytes: float | None
    prefill_s: float | None  # median, of the prompts computed without a reused prefix where there are any
    build_s: float | None
    decode_ms_p10: float | None
    decode_ms_p50: float | None
    decode_ms_p90: float | None


def summarise(records: Sequence[Record]) -> list[Row]:
    """Rows by method, in order of first appearance, then by length."""
    references = {(r.task, r.length, r.sample): r for r in records if r.method == _REFERENCE and r.status == "ok"}
    order = {label: i for i, label in enumerate(dict.fromkeys(r.method for r in records))}
    cells = sorted({(order[r.method], r.method, r.length) for r in records})
    return [
        _row(label, length, [r for r in records if r.method == label and r.length == length], references)
        for _, label, length in cells
    ]


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> float | None:
    """Share of the reference's tokens 2..n that stand at the same place; the first is always the prefill's."""
    if len(reference) < 2:
        return None
    pairs = zip(reference[1:], [*tokens[1:], *[None] * len(reference)], strict=False)
    return sum(a == b for a, b in pairs) / (len(reference) - 1)


def write_reports(folder: Path) -> list[Row]:
    """Write summary.csv, summary.md and plots/ of a run folder; returns the rows."""
    import pandas as pd

    from evals.plots import write_heatmap

    manifest, records = read_run(folder)
    rows = summarise(records)
    frame = pd.DataFrame([{**asdict(row), "notes": "; ".join(manifest.notes)} for row in rows])
    frame.to_csv(folder / "summary.csv", index=False)
    (folder / "summary.md").write_text(markdown(manifest, rows), encoding="utf-8")
    (folder / "plots").mkdir(exist_ok=True)
    write_heatmap(folder / "plots" / "heatmap.png", records, title=title(manifest))
    return rows


def title(manifest: Manifest) -> str:
    """One line that says what was run on what."""
    model = manifest.model
    return f"{manifest.benchmark} · {model['name']} · {model['dtype']} on {model['device']}"


def markdown(manifest: Manifest, rows: Sequence[Row]) -> str:
    """The summary as a Markdown table, with what a reader must know above and below it."""
    session = manifest.sessions[-1]
    lines = [f"# {title(manifest)}", ""]
    lines += [f"**{note}**\n" for note in manifest.notes]
    head = [
        *("method", "length", "score", "scored", "agreement", "KV device MiB", "KV host MiB"),
        *("prefill s", "build s", "decode ms/token p10 / p50 / p90"),
    ]
    lines += ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    for row in rows:
        times = " / ".join(_number(x, ".1f") for x in (row.decode_ms_p10, row.decode_ms_p50, row.decode_ms_p90))
        cells = [
            *(row.method, str(row.length), _number(row.score, ".2f"), f"{row.scored}/{row.total}"),
            *(_number(row.agreement, ".2f"), _mib(row.device_bytes), _mib(row.host_bytes)),
            *(_number(row.prefill_s, ".2f"), _number(row.build_s, ".3f"), times),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    gpu = session.machine.get("gpu")
    lines += [
        "",
        "Score: mean over scored answers. Agreement: share of tokens 2..n equal to full attention's; the first token "
        "comes from the prefill under every method. Prefill: median, once per prompt for all methods.",
        "",
        f"`{session.command}`",
        "",
        f"{gpu or session.machine['cpu']}, {session.machine['torch_threads']} threads · "
        + ", ".join(f"{name} {version}" for name, version in session.versions.items()),
    ]
    return "\n".join(lines) + "\n"


def _row(label: str, length: int, records: list[Record], references: dict[tuple[str, int, str], Record]) -> Row:
    good = [r for r in records if r.status == "ok"]
    agreements = [
        agreement(r.tokens, references[(r.task, r.length, r.sample)].tokens)
        for r in good
        if (r.task, r.length, r.sample) in references
    ]
    cold = [r.prefill_s for r in good if r.reused_tokens == 0] or [r.prefill_s for r in good]
    steps = [ms for r in good if (ms := r.decode_ms_per_token) is not None]
    p10, p50, p90 = (_percentile(steps, q) for q in (10, 50, 90))
    return Row(
        method=label,
        length=length,
        score=_mean([r.score for r in good]),
        scored=len(good),
        total=len(records),
        agreement=_mean(agreements),
        device_bytes=_mean([r.device_bytes for r in good]),
        host_bytes=_mean([r.host_bytes for r in good]),
        prefill_s=_percentile(cold, 50),
        build_s=_percentile([r.build_s for r in good], 50),
        decode_ms_p10=p10,
        decode_ms_p50=p50,
        decode_ms_p90=p90,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _percentile(values: Sequence[float], q: float) -> float | None:
    return float(np.percentile(values, q)) if values else None


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.1f}"
