"""What a RULER run shows: tasks x lengths x methods, averages and effective lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evals.common.grouping import grouped
from evals.ruler.tasks import EFFECTIVE_SCORE, TASKS
from evals.runs.results import Record
from evals.tables.plots import write_task_bars
from evals.tables.statistics import mean_of_means
from evals.tables.summary import methods_of, scores_of
from evals.tables.table import Table, percent, tokens

_SHORT = dict(zip(TASKS, "s1 s2 s3 mk1 mk2 mk3 mv mq vt cwe fwe qa1 qa2".split(), strict=True))

_MOST_BARS = 8  # methods side by side that can be told apart


def ruler_tables(records: Sequence[Record]) -> list[Table]:
    """Percent by task, and the effective length of every method."""
    tasks = [task for task in TASKS if any(r.task == task for r in records)]
    lengths = sorted({r.length for r in records})
    held = grouped(records, lambda r: (r.method, r.length, r.task))
    lines, effective = [], []
    for label in methods_of(records):
        exceeding, averaged = [], []
        for length in lengths:
            cells = [scores_of(held.get((label, length, task), [])) for task in tasks]
            average = mean_of_means(cells) if all(cells) else None
            if average is not None:
                averaged.append(length)
            if average is not None and 100 * average > EFFECTIVE_SCORE:
                exceeding.append(length)
            lines.append([label, tokens(length), *(percent(mean_of_means([cell])) for cell in cells), percent(average)])
        # Nothing is known below the shortest length that has an average, and nothing at all without one.
        known = f"below {tokens(averaged[0])}" if averaged[:1] == lengths[:1] else "–"
        effective.append([label, tokens(max(exceeding)) if exceeding else known])
    said = ", ".join(f"{_SHORT[task]} {task}" for task in tasks if _SHORT[task] != task)
    whole = len(tasks) == len(TASKS)
    matrix = Table(
        "RULER, percent by task",
        ["method", "length", *(_SHORT[task] for task in tasks), "average"],
        lines,
        f"{said}. Average: over the {len(tasks)} tasks{'' if whole else f' run, out of {len(TASKS)}'}; none where a "
        "task has no scored answer.",
        names=2,
        shaded=True,
    )
    longest = Table(
        "Effective length",
        ["method", "effective length"],
        effective,
        f"The longest length run whose average exceeds {EFFECTIVE_SCORE} (Llama-2-7B at 4K, the paper's threshold)."
        + ("" if whole else f" Only {len(tasks)} of {len(TASKS)} tasks were run: not the paper's figure."),
    )
    return [matrix, longest]


def right_or_wrong(record: Record) -> bool:
    """Whether an answer can only be right or wrong: one reference, or any of several, decides."""
    return len(record.references) == 1 or record.task.startswith("qa_")


def write_ruler_plots(folder: Path, records: Sequence[Record], title: str) -> list[Path]:
    """A tasks_<length>.png for every length; many methods are read from the table."""
    if len(methods_of(records)) > _MOST_BARS:
        return []
    by_length = dict(sorted(grouped(records, lambda r: r.length).items()))
    made = []
    for length, found in by_length.items():
        tasks = [task for task in TASKS if any(r.task == task for r in found)]
        made.append(write_task_bars(folder / f"tasks_{length}.png", found, f"{title} · {tokens(length)}", tasks))
    return made
