"""One user message in the model's chat template, with the answer already begun."""

from __future__ import annotations

from typing import Any

from shadowkv.errors import SkvError

_MESSAGE = "\x02MESSAGE\x03"  # stands for the message while the template is applied


class Chat:
    """The tokenizer's chat template around one message; nothing around it for a tokenizer without a template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._head, self._tail = "", ""
        if self.templated:
            turn = [{"role": "user", "content": _MESSAGE}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            self._head, found, self._tail = text.partition(_MESSAGE)
            if not found:
                raise SkvError("this model's chat template drops or changes the message; prompts cannot be made")

    def text(self, message: str, answer_prefix: str = "") -> str:
        """The whole prompt; the answer prefix comes after the assistant's header, as the start of its answer."""
        return f"{self._head}{message}{self._tail}{answer_prefix}"

    def ids(self, text: str) -> list[int]:
        """Token ids of a whole prompt. A template spells out its special tokens; a plain prompt gets the usual ones."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=not self.templated, verbose=False)["input_ids"]
        return ids
