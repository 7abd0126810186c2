"""LongBench's prompt templates: the official ones, a user's copy of them, or our own wording."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.common.literals import literals
from evals.longbench.tasks import TASKS
from shadowkv.common.errors import SkvError
from shadowkv.common.reading import decoded
from shadowkv.models.packs import pack_manifest, pack_path

# The packaged templates differ from the authors' by white space in six places; with these they are equal, byte by
# byte, which the checksums of `tasks.TASKS` prove.
_MENDED = {
    "triviaqa": ("{context}\n", "{context}\n\n"),
    "samsum": ("{context}\n", "{context}\n\n"),
}
_ENDINGS = {"passage_count": " ", "passage_retrieval_en": " ", "lcc": "\n", "repobench-p": "\n"}

_ASKED = "{context}\n\nAnswer a question from the text above, as briefly as possible.\n\nQuestion: {input}\n\nAnswer:"
_ASKED_ZH = "{context}\n\n请根据上文尽量简短地回答问题。\n\n问题：{input}\n\n回答："
_OWN = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), _ASKED),
    **dict.fromkeys(("multifieldqa_zh", "dureader"), _ASKED_ZH),
    **dict.fromkeys(("gov_report", "multi_news"), "{context}\n\nSummarise the text above on one page.\n\nSummary:"),
    "qmsum": "{context}\n\nAnswer from the minutes above, in a few sentences.\n\nRequest: {input}\n\nAnswer:",
    "vcsum": "{context}\n\n请总结以上会议内容。\n\n总结：",
    "trec": "Name the type of each question.\n\n{context}\n{input}",
    "triviaqa": "Answer like in the examples, from the passage only.\n\n{context}\n\n{input}",
    "samsum": "Summarise each dialogue like in the examples.\n\n{context}\n\n{input}",
    "lsht": "请像示例那样给出新闻的类别。\n\n{context}\n{input}",
    "passage_count": "{context}\n\nHow many different paragraphs are there above, copies not counted?\n\nNumber: ",
    "passage_retrieval_en": "{context}\n\nWhich paragraph is this a summary of?\n\n{input}\n\nParagraph number: ",
    "passage_retrieval_zh": "{context}\n\n下面是哪一段的摘要？\n\n{input}\n\n段落编号：",
    "lcc": "Write the next line of this code:\n{context}\n",
    "repobench-p": "Write the next line of this code:\n{context}{input}\n",
}


@dataclass(frozen=True)
class Templates:
    """Templates by task, with {context} and {input}; and whether they are, to the byte, the official ones."""

    by_task: dict[str, str]
    described: dict[str, Any]
    official: bool


def templates(spec: str, tasks: Collection[str]) -> Templates:
    """`official` (pulled), `own`, or a JSON file such as the authors' dataset2prompt.json."""
    if spec == "official":
        made = _pulled()
        wrong = [task for task in tasks if not _is_official(task, made[task])]
        if wrong:
            raise SkvError(
                f"the pulled template of {wrong[0]} is not the official one; run 'skv pull longbench --force'"
            )
        return Templates(made, {"name": "lm_eval", "wheels": pack_manifest("longbench")["wheels"]}, True)
    if spec == "own":
        return Templates(_OWN, {"name": "own wording", "version": "1"}, False)
    made, digest = _from_file(Path(spec).expanduser(), tasks)
    official = all(_is_official(task, made[task]) for task in tasks)
    return Templates(made, {"name": Path(spec).name, "sha256": digest, "official": official}, official)


def _pulled() -> dict[str, str]:
    folder = pack_path("longbench")
    if folder is None:
        raise SkvError("LongBench's templates are not pulled; run 'skv pull longbench' or use --wording own")
    packaged: dict[str, str] = literals(folder / "templates.py")["dataset2prompt"][0]
    made = {}
    for task in TASKS:
        text = packaged[task].replace("{question}", "{input}") + _ENDINGS.get(task, "")
        made[task] = text.replace(*_MENDED[task]) if task in _MENDED else text
    return made


def _from_file(path: Path, tasks: Collection[str]) -> tuple[dict[str, str], str]:
    try:
        raw = path.read_bytes()
        made = json.loads(decoded(raw, f"templates {path}"))
    except OSError as error:
        hint = "" if path.suffix else "; --wording takes official, own or a file"
        raise SkvError(f"templates {path} cannot be read: {error.strerror}{hint}") from None
    except ValueError:
        raise SkvError(f"templates {path} are not JSON") from None
    for task in tasks:
        text = made.get(task) if isinstance(made, dict) else None
        if not isinstance(text, str) or "{context}" not in text:
            raise SkvError(f"templates {path} hold no text with {{context}} for {task}")
        try:
            text.format(context="", input="")
        except (KeyError, ValueError, IndexError):
            raise SkvError(
                f"templates {path}: that of {task} has other fields than {{context}} and {{input}}"
            ) from None
    return made, hashlib.sha256(raw).hexdigest()


def _is_official(task: str, text: str) -> bool:
    return hashlib.sha256(text.encode()).hexdigest()[:16] == TASKS[task].template_sha256_16
