"""What a LongBench run shows: tasks, category means, and the averages that papers report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evals.common.grouping import grouped
from evals.longbench.tasks import CATEGORIES, SIXTEEN, TASKS
from evals.longbench.v2 import named_choice
from evals.runs.results import Record
from evals.tables.plots import write_score_by_group, write_task_bars
from evals.tables.statistics import mean_of_means
from evals.tables.summary import methods_of, scores_of
from evals.tables.table import Table, percent

_BUCKETS = ("0-4k", "4-8k", "8k+")


def longbench_tables(records: Sequence[Record]) -> list[Table]:
    """Percent by task and in the mean; for LongBench-E by length class as well."""
    labels = methods_of(records)
    scores = {label: _by_task([r for r in records if r.method == label]) for label in labels}
    ran = {record.task.removesuffix("_e") for record in records}
    tasks = [task for task in TASKS if task in ran]
    lines = [[task, *(percent(scores[label].get(task), 2) for label in labels)] for task in tasks]
    for name, wanted in _averages():
        cells = [_average(scores[label], wanted) for label in labels]
        if any(cell is not None for cell in cells):
            lines.append([name, *(percent(cell, 2) for cell in cells)])
    table = Table(
        "LongBench, percent by task",
        ["task", *labels],
        lines,
        "Means are over tasks, those over categories over the means of categories, and only where every task they "
        "need has scored answers. Code counts in both languages. " + _coverage(records),
        shaded=True,
    )
    e = [r for r in records if r.task.endswith("_e")]
    return [table, _by_bucket(e)] if e else [table]


def write_longbench_plots(folder: Path, records: Sequence[Record], title: str) -> list[Path]:
    """score_by_class.png over LongBench-E's length classes, and tasks.png."""
    groups = [(bucket, [r for r in records if r.meta["bucket"] == bucket]) for bucket in _BUCKETS]
    groups = [(name, found) for name, found in groups if found]
    tasks = [label for task in TASKS for label in (task, f"{task}_e") if any(r.task == label for r in records)]
    return [
        write_score_by_group(folder / "score_by_class.png", groups, title, "length of the row, words"),
        write_task_bars(folder / "tasks.png", records, title, tasks),
    ]


def v2_tables(records: Sequence[Record]) -> list[Table]:
    """Accuracy over all questions, by difficulty and by length class."""
    parts = [("overall", "", "")]
    parts += [(value, "difficulty", value) for value in ("easy", "hard")]
    parts += [(value, "length", value) for value in ("short", "medium", "long")]
    lines = []
    for label in methods_of(records):
        mine = [r for r in records if r.method == label]
        cells = [scores_of([r for r in mine if not key or r.meta[key] == value]) for _, key, value in parts]
        unparsed = sum(named_choice(r.prediction) is None for r in mine if r.score is not None)
        lines.append([label, *(percent(mean_of_means([cell])) for cell in cells), str(unparsed)])
    head = ["method", *(name for name, _, _ in parts), "without a choice"]
    return [Table("LongBench v2, accuracy in percent", head, lines, "Guessing gives 25.")]


def write_v2_plots(folder: Path, records: Sequence[Record], title: str) -> list[Path]:
    """score_by_class.png over the three length classes."""
    groups = [(value, [r for r in records if r.meta["length"] == value]) for value in ("short", "medium", "long")]
    groups = [(name, found) for name, found in groups if found]
    return [write_score_by_group(folder / "score_by_class.png", groups, title, "length class")]


def _coverage(records: Sequence[Record]) -> str:
    """How many rows the numbers stand for, and whether all methods answered the same ones."""
    rows = {label: {r.prompt for r in found} for label, found in grouped(records, lambda r: r.method).items()}
    counts = [len(found) for found in grouped(sorted(set.union(*rows.values())), lambda row: row[0]).values()]
    said = f"Rows per task: {min(counts)}" + (f" to {max(counts)}." if max(counts) > min(counts) else ".")
    alike = len({frozenset(found) for found in rows.values()}) == 1
    return said if alike else f"{said} METHODS DID NOT ANSWER THE SAME ROWS: their scores do not compare."


def _by_task(records: Sequence[Record]) -> dict[str, float]:
    """Mean score by task; a task of LongBench-E under its plain name. Tasks without a scored answer are not in it."""
    found = grouped(records, lambda r: r.task.removesuffix("_e"))
    scores = {task: scores_of(same) for task, same in found.items()}
    return {task: sum(held) / len(held) for task, held in scores.items() if held}


def _averages() -> list[tuple[str, list[list[str]]]]:
    """Name of each mean, and the groups of tasks whose means it is the mean of."""
    made: list[tuple[str, list[list[str]]]] = []
    for category in CATEGORIES:
        members = [spec for spec in TASKS.values() if spec.category == category]
        english = [[spec.name for spec in members if spec.language != "zh"]]
        made.append((f"mean of {category}{'' if category == CATEGORIES[-1] else ', English'}", english))
    for language, name in (("en", "English"), ("zh", "Chinese")):
        groups = [
            [s.name for s in TASKS.values() if s.category == category and s.language in (language, "code")]
            for category in CATEGORIES
        ]
        made.append((f"{name} average (6 categories)", groups))
    made.append(("mean of the 16 English and code tasks", [[task] for task in SIXTEEN]))
    return made


def _average(scores: dict[str, float], groups: list[list[str]]) -> float | None:
    if not all(task in scores for group in groups for task in group):
        return None
    return mean_of_means([[scores[task] for task in group] for group in groups])


def _by_bucket(records: Sequence[Record]) -> Table:
    lines = []
    for label in methods_of(records):
        for task in TASKS:
            mine = [r for r in records if r.method == label and r.task == f"{task}_e"]
            cells = [scores_of([r for r in mine if r.meta["bucket"] == bucket]) for bucket in _BUCKETS]
            if mine:
                lines.append([label, task, *(percent(mean_of_means([cell]), 2) for cell in cells)])
    head = ["method", "task", *_BUCKETS]
    return Table("LongBench-E, percent by length class", head, lines, "Classes count words, not tokens.", names=2)
