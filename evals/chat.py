"""One user message in the model's chat template, with the answer already begun."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from shadowkv.errors import SkvError
from shadowkv.wording import one_line

_MESSAGE = "\x02MESSAGE\x03"  # stands for the message while the template is applied
_TODAY = datetime(2024, 7, 26)  # for templates that print the date: prompts must not change from day to day


class Chat:
    """The tokenizer's chat template around one message; nothing around it for a tokenizer without a template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._head, self._tail = "", ""
        if self.templated:
            self._head, found, self._tail = rendered(tokenizer, [("user", _MESSAGE)]).partition(_MESSAGE)
            if not found or _MESSAGE in self._tail:
                raise SkvError(
                    "this model's chat template drops, repeats or changes the message; no prompts can be made"
                )

    def text(self, message: str, answer_prefix: str = "") -> str:
        """The whole prompt; the answer prefix comes after the assistant's header, as the start of its answer."""
        return f"{self._head}{message}{self._tail}{answer_prefix}"

    def ids(self, text: str) -> list[int]:
        """Token ids of a whole prompt. A template spells out its special tokens; a plain prompt gets the usual ones."""
        return prompt_ids(self._tokenizer, text, special=not self.templated)


def prompt_ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a text to go on from: with the tokenizer's usual beginning if wanted, and never with an end."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids[:-1] if special and ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


def rendered(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str:
    """Turns of (role, content) in the chat template, up to where the assistant answers, on a fixed day."""
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            date_string=_TODAY.strftime("%d %b %Y"),
            strftime_now=_TODAY.strftime,
        )
    except Exception as error:  # a template is a program of its authors', and may raise anything
        raise SkvError(f"this model's chat template cannot be applied: {one_line(error)}") from error
    return str(text)
