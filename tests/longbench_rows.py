"""Two rows of our own for each of the 21 tasks, in the schema of LongBench's files."""

from __future__ import annotations

import json

from evals.longbench.tasks import TASKS

_EN = "The ferry left the harbour at noon. Martha counted twelve crates of pears. The captain slept below. "
_ZH = "渡船中午离开了港口。玛莎数了十二箱梨子。船长在下面睡觉。"
_CODE = (
    "def area(width, height):\n    # both in metres\n    return width * height\n\n\ndef volume(width, height, depth):\n"
)
_ANSWERS = {
    "passage_count": "12",
    "passage_retrieval_en": "Paragraph 3",
    "passage_retrieval_zh": "段落3",
    "trec": "Food",
    "lsht": "财经",
    "lcc": "    return area(width, height) * depth",
    "repobench-p": "    return area(width, height) * depth",
}
_CLASSES = {"trec": ["Food", "Currency", "Event"], "lsht": ["财经", "体育", "天气"]}


def rows(task):
    """Dicts as in the file of a task."""
    spec = TASKS[task]
    context = {"en": _EN * 8, "zh": _ZH * 8, "code": _CODE * 4}[spec.language]
    answer = _ANSWERS.get(task, "玛莎数了十二箱" if spec.language == "zh" else "Martha counted twelve crates")
    return [
        {
            "input": f"Question {number}: who counted what?"
            if spec.language != "zh"
            else f"问题{number}：谁数了什么？",
            "context": context + str(number),
            "answers": [answer, answer],
            "length": 3000 + 3000 * number,
            "dataset": task,
            "language": spec.language,
            "all_classes": _CLASSES.get(task),
            "_id": f"{task}-{number}",
        }
        for number in range(2)
    ]


def write(folder, tasks=tuple(TASKS), suffix=""):
    """<folder>/<task>.jsonl for every task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows(task))
        (folder / f"{task}{suffix}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
