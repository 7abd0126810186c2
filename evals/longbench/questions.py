"""What a prompt of LongBench asks behind its text, and what counts as the question of tasks that have none."""

from __future__ import annotations

from collections.abc import Mapping

from evals.common.asking.question import what_follows
from evals.longbench.tasks import CODE, Spec
from shadowkv.common.errors import SkvError

_CONTEXT, _INPUT = "context", "input"


def question_of(template: str, spec: Spec, asked: str) -> str:
    """What follows the text, filled in: instruction, question, and where the answer goes.

    Code is completed, not asked about, so all of it is the text, the open file (`input`) too.
    """
    return what_follows(template, _text_of(template, spec), input=asked)


def question_notes(templates: Mapping[Spec, str]) -> list[str]:
    """What tables say of tasks that ask no question. Raises `SkvError` for a template that asks before its text."""
    for spec, template in templates.items():
        text, behind = template.rpartition(f"{{{_text_of(template, spec)}}}")[::2]
        # Behind code there may be no more than the end of its last line.
        asks = bool(behind) if spec.category == CODE else bool(behind.strip()) and f"{{{_INPUT}}}" not in text
        if not asks:
            raise SkvError(f"--question after: the template of {spec.name} asks nothing behind its text")
    code = [spec.name for spec in templates if spec.category == CODE]
    told = [spec.name for spec, text in templates.items() if f"{{{_INPUT}}}" not in text and spec.category != CODE]
    notes = [f"{', '.join(told)}: no question; the instruction behind the text comes after it"] if told else []
    if code:
        notes.append(
            f"{', '.join(code)}: no question; methods take over all of the code, and what begins the answer "
            "comes after it"
        )
    return notes


def _text_of(template: str, spec: Spec) -> str:
    """The field that a question would be about: the last one of code."""
    last = template.rfind(f"{{{_INPUT}}}") > template.rfind(f"{{{_CONTEXT}}}")
    return _INPUT if spec.category == CODE and last else _CONTEXT
