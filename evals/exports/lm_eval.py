"""Accuracy runs as results files of lm-evaluation-harness: its schema (`result_schema.py` of 0.4.13), not its tasks.

The harness has one file per model; a KV-cache method is a model of its own here. Tasks are called
`skv_<benchmark>_<task>_<length>`, because prompts are not the harness's own: scores do not compare with its tasks.
Where the question comes after the text, `skv_<benchmark>_after_<task>_<length>`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from evals.common.asking.question import IN_PROMPT
from evals.common.grouping import grouped
from evals.reporting.folders import Run
from evals.runs.results import Record
from evals.tables.statistics import mean_of_means
from evals.tables.summary import scores_of

_METRIC = "score"
_FILTER = "none"


def write_lm_eval(runs: Sequence[Run], folder: Path) -> list[Path]:
    """lm-eval/<run>/<method>/results_<time>.json for every accuracy run and method; other runs have no such form."""
    made = []
    for run in (run for run in runs if run.is_accuracy):
        for label, records in grouped(run.answers, lambda r: r.method).items():
            place = folder / "lm-eval" / run.name / re.sub(r"[^\w.=+-]", "_", label)
            place.mkdir(parents=True, exist_ok=True)
            file = place / f"results_{_started(run).replace(':', '-')}.json"
            file.write_text(json.dumps(results_of(run, label, records), indent=2, allow_nan=False) + "\n", "utf-8")
            made.append(file)
    return made


def results_of(run: Run, label: str, records: Sequence[Record]) -> dict[str, Any]:
    """One method of a run in the harness's schema. A task without a scored answer has no metric: nothing is 0."""
    manifest, model = run.manifest, run.manifest.model
    tasks = grouped(records, _task)
    lengths = grouped(tasks, lambda name: f"{_family(tasks[name][0])}_{tasks[name][0].length}")
    name = f"{model['name']}+{label}"
    seed = manifest.config.get("seed")
    session = manifest.sessions[-1] if manifest.sessions else None
    return {
        "results": {
            task: {"alias": task, "sample_len": _prompts(found), **_metrics(found)} for task, found in tasks.items()
        },
        "groups": {group: {"alias": group, **_group(group, [tasks[t] for t in of])} for group, of in lengths.items()},
        "group_subtasks": dict(lengths),
        "configs": {task: _config(run, task, found) for task, found in tasks.items()},
        "versions": dict.fromkeys(tasks, manifest.schema),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {task: {_METRIC: True} for task in tasks},
        "n-samples": {
            task: {"original": _prompts(found), "effective": len(scores_of(found))} for task, found in tasks.items()
        },
        "config": {
            "model": "skv",
            "model_args": {"pretrained": model["name"], "method": label, **_finite(manifest.methods.get(label, {}))},
            "model_dtype": model["dtype"],
            "model_sha": model["weights_sha256"] or "",
            "device": model["device"],
            "batch_size": "1",
            "limit": None,
            "bootstrap_iters": 0,
            "gen_kwargs": _drawing(run),
            **({} if seed is None else dict.fromkeys(("random_seed", "numpy_seed", "torch_seed"), seed)),
        },
        "git_hash": (session.git or {}).get("commit", "") if session else "",
        "date": datetime.fromisoformat(session.started).timestamp() if session else 0.0,
        "transformers_version": session.versions.get("transformers", "") if session else "",
        "model_source": "skv",
        "model_name": name,
        "model_name_sanitized": re.sub(r"[\"<>:/\|\\?\*\[\]]+", "__", name),
        "skv_notes": [*manifest.marks, *manifest.notes, *run.problems],
    }


def _finite(params: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which some parameters are."""
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in params.items()}


def _started(run: Run) -> str:
    return run.manifest.sessions[-1].started if run.manifest.sessions else "unknown"


def _prompts(records: Sequence[Record]) -> int:
    return len({record.prompt for record in records})


def _task(record: Record) -> str:
    return f"{_family(record)}_{record.task}_{record.length}"


def _family(record: Record) -> str:
    return f"skv_{record.benchmark}" + ("" if record.question == IN_PROMPT else f"_{record.question}")


def _drawing(run: Run) -> dict[str, Any]:
    """How tokens were chosen, in the words of transformers."""
    sampling = run.manifest.config.get("sampling")
    if sampling is None:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling["temperature"], "top_p": sampling["top_p"]}


def _metrics(records: Sequence[Record]) -> dict[str, float]:
    scores = scores_of(records)
    if not scores:
        return {}
    metrics = {f"{_METRIC},{_FILTER}": float(np.mean(scores))}
    if len(scores) > 1:
        metrics[f"{_METRIC}_stderr,{_FILTER}"] = float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    return metrics


def _group(name: str, tasks: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """The mean over tasks, if all of them have one."""
    cells = [scores_of(found) for found in tasks]
    mean = mean_of_means(cells) if all(cells) else None
    counted = {"sample_count": {f"{_METRIC},{_FILTER}": sum(map(len, cells))}}
    return {"name": name, **({} if mean is None else {f"{_METRIC},{_FILTER}": mean, **counted})}


def _asked(record: Record) -> dict[str, Any]:
    place = {} if record.question == IN_PROMPT else {"question": record.question}
    return {"length_tokens": record.length, **place}


def _config(run: Run, task: str, records: Sequence[Record]) -> dict[str, Any]:
    manifest = run.manifest
    return {
        "task": task,
        "dataset_path": "",
        "output_type": "generate_until",
        "metric_list": [{"metric": _METRIC, "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {**_drawing(run), "max_gen_toks": records[0].meta.get("max_new_tokens")},
        "repeats": manifest.config.get("sampling", {}).get("answers", 1),
        "metadata": {**manifest.config, **_asked(records[0]), "sources": manifest.sources},
    }
