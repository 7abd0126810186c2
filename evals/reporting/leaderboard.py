"""One ranking of many runs. Only answers to the very same prompts, by the same model, are ranked together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evals.common.asking.drawing import prompt_name
from evals.common.asking.question import IN_PROMPT
from evals.common.grouping import grouped
from evals.reporting.folders import Found, Run, make_folder
from evals.reporting.page import render_leaderboard
from evals.runs.results import Record
from evals.tables.statistics import BOOTSTRAP_95
from evals.tables.summary import REFERENCE, Row, summarise
from evals.tables.table import Table, mib, number, percent, tokens
from shadowkv.common.errors import SkvError

_COLUMNS = ["rank", "method", "setting", "score, %", "95 %", "agree", "tokens\nread", "device\nKV MiB", "of full\n%",
            "host\nKV MiB", "runs"]  # fmt: skip
_CAPTION = (
    f"Score: mean over tasks. Interval: {BOOTSTRAP_95}; an order within overlapping intervals is not settled. "
    "Unranked: methods that lack an answer to some prompt of the group. Of full: device bytes over full attention's."
)
_UNRANKED = "–"


class _Kind(NamedTuple):
    """What answers must share to be ranked together."""

    benchmark: str
    settings: str  # model, its weights, and every setting and source that changes a number
    length: int
    question: str  # where it stands
    prompts: frozenset[tuple[str, str, str]]  # task, sample, checksum; of drawn answers, each


@dataclass(frozen=True)
class Group:
    """A ranking of what is comparable."""

    title: str
    runs: Sequence[str]
    notes: Sequence[str]
    problems: Sequence[str]
    table: Table


@dataclass(frozen=True)
class Leaderboard:
    """Groups, and why runs are in none."""

    groups: Sequence[Group]
    left_out: Mapping[str, str]


class _Part(NamedTuple):
    """The answers of one run at one length."""

    run: Run
    records: Sequence[Record]


def rank(found: Found) -> Leaderboard:
    """Group the runs' answers and rank the methods of each group."""
    parts: dict[_Kind, list[_Part]] = {}
    left_out = dict(found.left_out)
    for run in found.runs:
        if not run.is_accuracy:
            left_out[run.name] = f"a {run.manifest.benchmark} run has no scores to rank"
        for (length, place), records in grouped(run.answers, lambda r: (r.length, r.question)).items():
            prompts = frozenset((r.task, r.sample, r.prompt_sha256) for r in records)
            kind = _Kind(run.manifest.benchmark, _settings(run), length, place, prompts)
            parts.setdefault(kind, []).append(_Part(run, records))
    if not parts:
        raise SkvError("; ".join(f"{name} is left out: {why}" for name, why in left_out.items()))
    order = sorted(
        parts,
        key=lambda kind: (kind.benchmark, kind.settings, kind.length, kind.question != IN_PROMPT, -len(kind.prompts)),
    )
    return Leaderboard([_group(kind, parts[kind]) for kind in order], left_out)


def write_leaderboard(board: Leaderboard, out: Path) -> list[Path]:
    """leaderboard.html, whose columns sort, and leaderboard.md."""
    make_folder(out)
    lines = ["# Leaderboard", "", *(f"**{name} is left out: {why}**\n" for name, why in board.left_out.items())]
    for group in board.groups:
        lines += [group.table.markdown(), *(f"**{text}**\n" for text in [*group.notes, *group.problems])]
        lines.append(f"Runs: {', '.join(group.runs)}\n")
    (out / "leaderboard.md").write_text("\n".join(lines), encoding="utf-8")
    title = f"{len(board.groups)} rankings" if len(board.groups) != 1 else board.groups[0].title
    page = render_leaderboard(title, groups=board.groups, left_out=board.left_out)
    (out / "leaderboard.html").write_text(page, encoding="utf-8")
    return [out / "leaderboard.html", out / "leaderboard.md"]


def _settings(run: Run) -> str:
    """All that changes a number. A run without run.json is like no other."""
    manifest = run.manifest
    model = {key: value for key, value in manifest.model.items() if key not in ("device", "source")}
    alone = None if manifest.sessions else run.name
    config = {key: value for key, value in manifest.config.items() if key != "question"}  # which answers say
    return json.dumps([model, config, manifest.sources, alone], sort_keys=True)


def _group(kind: _Kind, parts: Sequence[_Part]) -> Group:
    manifest = parts[0].run.manifest
    first, problems = _merged(parts)
    wanted, sampling = len(kind.prompts), manifest.config.get("sampling")
    what = "answers to draw have" if sampling else "prompts have"
    rows = summarise(first)
    ranked = sorted((r for r in rows if r.scored == wanted), key=lambda r: -(r.score or 0.0))
    others = [row for row in rows if row.scored < wanted]
    full = next((row for row in rows if row.method == REFERENCE), None)
    runs = {label: [p.run.name for p in parts if any(r.method == label for r in p.records)] for label in
            {row.method for row in rows}}  # fmt: skip
    lines = []
    for row in ranked:
        place = 1 + sum((other.score or 0.0) > (row.score or 0.0) for other in ranked)
        lines.append(_line(str(place), row, full, runs[row.method]))
    for row in others:
        lines.append(_line(_UNRANKED, row, full, runs[row.method]))
        problems.append(f"{row.method} is unranked: {row.scored} of {wanted} {what} a scored answer")
    count = len({(task, prompt_name(sample)) for task, sample, _ in kind.prompts})
    prompts = f"{count} prompt{'s' * (count > 1)}"
    if sampling:
        prompts += f" x {sampling['answers']} at temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}"
    title = f"{manifest.title_of(kind.question)} · {tokens(kind.length)} · {prompts}"
    notes = list(dict.fromkeys(note for part in parts for note in part.run.manifest.notes))
    problems += [f"{part.run.name}: {problem}" for part in parts for problem in part.run.problems]
    names = list(dict.fromkeys(part.run.name for part in parts))
    return Group(title, names, notes, problems, Table(title, _COLUMNS, lines, _CAPTION, names=3))


def _merged(parts: Sequence[_Part]) -> tuple[list[Record], list[str]]:
    """Every answer once: that of the first run that has a scored one. Says where another run's score differs."""
    kept: dict[tuple[str, str, str], tuple[str, Record]] = {}
    differing: dict[tuple[str, str, str], int] = {}
    for run, records in parts:
        for record in records:
            key = (record.method, record.task, record.sample)
            name, older = kept.get(key, (run.name, record))
            if older.score is None:
                name, older = run.name, record
            kept[key] = name, older
            if None not in (record.score, older.score) and record.score != older.score:
                pair = (record.method, name, run.name)
                differing[pair] = differing.get(pair, 0) + 1
    said = [
        f"{method}: {count} scores of {later} differ from those of {earlier}, which count"
        for (method, earlier, later), count in differing.items()
    ]
    return [record for _, record in kept.values()], said


def _line(place: str, row: Row, full: Row | None, runs: Sequence[str]) -> list[str]:
    name, _, setting = row.method.partition(":")
    low, high = percent(row.score_low), percent(row.score_high)
    whole = full.device_bytes if full is not None else None
    relative = row.device_bytes / whole if whole and row.device_bytes is not None else None
    return [
        place,
        name,
        setting,
        percent(row.score),
        "–" if row.score_low is None else f"{low}–{high}",
        number(row.agreement, ".2f"),
        number(row.attended_tokens, ".0f"),
        mib(row.device_bytes),
        percent(relative),
        mib(row.host_bytes),
        ", ".join(runs),
    ]
