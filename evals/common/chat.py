"""One user message in the model's chat template, with the answer already begun.

Prompts are what the template itself makes of the whole message: templates trim, collapse and escape what they get.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from evals.common.asking.thoughts import Markers, ends_inside, find_markers, knows_thoughts
from shadowkv.common.errors import SkvError
from shadowkv.common.names import did_you_mean
from shadowkv.common.wording import one_line

# Stand for a message while the template is looked at: plain words, which no template has a reason to change.
_FIRST, _LAST = "firststandin", "laststandin"
_TODAY = datetime(2024, 7, 26)  # for templates that print the date: prompts must not change from day to day

THINKING = ("auto", "on", "off")
_SWITCHES = ("enable_thinking", "thinking")  # what templates call it: Qwen's and most others', Granite's and DeepSeek's


class Around(NamedTuple):
    """What a template makes of a message before and after a text inside it."""

    before: str
    after: str


class Chat:
    """The tokenizer's chat template around one message; nothing around it for a tokenizer without a template.

    thinking: on or off by the template's own switch, refused where it has none; auto is off where there is one, and
    what the template does by itself where there is none.
    """

    def __init__(self, tokenizer: Any, thinking: str = "auto") -> None:
        if thinking not in THINKING:
            known = ", ".join(THINKING)
            raise SkvError(f"unknown --thinking '{thinking}'{did_you_mean(thinking, THINKING)}; one of {known}")
        self._tokenizer = tokenizer
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._switched: dict[str, bool] = {}
        self.thinking: str | None = None  # on or off by the template's switch; None where it has none
        self.closing = ""  # what comes behind a message, up to where the assistant answers
        self.markers: Markers | None = None  # of thoughts; None where there are none, or nothing tells how they end
        if self.templated:
            self._switch("off" if thinking == "auto" else thinking)
            self._check()
            shown = self._rendered([("user", _FIRST)])
            self.closing = shown.rpartition(_FIRST)[2]
            if self._thinks_first or self._may_think:
                added = map(str, self._tokenizer.get_added_vocab())
                self.markers = find_markers([self.closing, shown, self._source(), *added])
        if thinking != "auto" and self.thinking is None:
            lacks = "chat template has no switch for it" if self.templated else "tokenizer has no chat template"
            raise SkvError(f"--thinking {thinking}: this model's {lacks}; leave it out")

    def text(self, message: str, answer_prefix: str = "") -> str:
        """The whole prompt; the answer prefix comes after the assistant's header, as the start of its answer."""
        shown = self._rendered([("user", message)]) if self.templated else message
        return shown + self.begun(answer_prefix)

    def begun(self, answer_prefix: str) -> str:
        """What of an answer stands in a prompt: nothing where a thought comes first, since it would be part of that."""
        return "" if self.markers and self._thinks_first else answer_prefix

    def ids(self, text: str) -> list[int]:
        """Token ids of a whole prompt. A template spells out its special tokens; a plain prompt gets the usual ones."""
        return prompt_ids(self._tokenizer, text, special=not self.templated)

    def around(self, before: str, inside: str, after: str, answer_prefix: str = "") -> Around:
        """The whole prompt of these three parts of a message, but for `inside`, which is to be put in as tokens.

        Raises `SkvError` where the template would change that text: the prompt would not be the template's.
        """
        text = self.text(f"{before}{inside}{after}", answer_prefix)
        if text.count(inside) != 1:
            raise SkvError(
                "this model's chat template changes the text inside a message, which a needle test puts in as tokens; "
                "'skv eval ruler' renders whole messages"
            )
        head, _, tail = text.partition(inside)
        return Around(head, tail)

    def next_turn(self, question: str, answer_prefix: str = "") -> str:
        """What comes between an answer and the next one: the end of the turn, the question, the start of its answer."""
        if not self.templated:
            return f"\n\n{question}\n{answer_prefix}"
        _, found, after = self._rendered([("user", "."), ("assistant", _FIRST), ("user", question)]).partition(_FIRST)
        if not found or _FIRST in after:
            raise SkvError("this model's chat template drops or changes earlier answers; --turns cannot be used")
        return after + self.begun(answer_prefix)

    def config(self) -> dict[str, str]:
        """What run.json says, so that runs which differ in it do not mix: nothing of a template without a switch."""
        return {} if self.thinking is None else {"thinking": self.thinking}

    def notes(self, answer_tokens: Collection[int], thought_tokens: int | None = None) -> list[str]:
        """What every table must say of thoughts, where answers may have so many tokens, and thoughts so many more."""
        if not self.templated or not answer_tokens:
            return []
        if self.thinking == "off" and not ends_inside(self.closing):
            return ["thinking is switched off in the chat template"]
        if not self._thinks_first and not self._may_think:
            return []
        if self.markers is None:
            return [self._limited(answer_tokens), "how thoughts of this model end is not known: they are scored too"]
        if thought_tokens is None:
            return [self._limited(answer_tokens), "thoughts are not scored; --thinking-tokens gives them room"]
        return [f"thoughts are not scored, and may take {thought_tokens} tokens beside the answer's"]

    def _limited(self, answer_tokens: Collection[int]) -> str:
        """That thoughts take an answer's room."""
        least, most = min(answer_tokens), max(answer_tokens)
        tokens = f"{most} tokens" if least == most else f"{least} to {most} tokens"
        if self.thinking == "on":
            return f"thinking is switched on in the chat template: the thought counts towards an answer's {tokens}"
        if self._thinks_first:
            begun = "this model's template begins a thought that cannot be switched off"
            return f"{begun}: an answer of {tokens} may end inside it"
        return f"this model's template knows of thoughts, which have no switch: an answer of {tokens} may be one"

    def _check(self) -> None:
        """Refuse a template that does not hold a message whole, and once."""
        whole = self._rendered([("user", f"{_FIRST} {'word ' * 2000}{_LAST}")]).lower()
        if whole.count(_FIRST) != 1 or whole.count(_LAST) != 1:
            raise SkvError("this model's chat template drops, repeats or changes the message; no prompts can be made")

    def _switch(self, wanted: str) -> None:
        """Set the template's switch, if it has one: whether it has shows in what it makes."""
        turns = [("user", _FIRST)]
        off, on = (dict.fromkeys(_SWITCHES, state) for state in (False, True))
        if rendered(self._tokenizer, turns, off) != rendered(self._tokenizer, turns, on):
            self.thinking, self._switched = wanted, on if wanted == "on" else off

    @property
    def _thinks_first(self) -> bool:
        """Whether an answer is to begin with a thought, or in one."""
        return self.thinking == "on" or ends_inside(self.closing)

    @property
    def _may_think(self) -> bool:
        """Whether the template knows of thoughts and cannot switch them."""
        return self.thinking is None and knows_thoughts(self._source())

    def _source(self) -> str:
        return str(self._tokenizer.chat_template)

    def _rendered(self, turns: Sequence[tuple[str, str]]) -> str:
        return rendered(self._tokenizer, turns, self._switched)


def prompt_ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a text to go on from: with the tokenizer's usual beginning if wanted, and never with an end."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids[:-1] if special and ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


def rendered(tokenizer: Any, turns: Sequence[tuple[str, str]], variables: dict[str, bool]) -> str:
    """Turns of (role, content) in the chat template, up to where the assistant answers, on a fixed day."""
    messages = [{"role": role, "content": content} for role, content in turns]
    dated = {"chat_template": _on_that_day(tokenizer)} if "strftime_now" in str(tokenizer.chat_template) else {}
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            date_string=_TODAY.strftime("%d %b %Y"),
            strftime_now=_TODAY.strftime,
            **dated,
            **variables,
        )
    except Exception as error:  # a template is a program of its authors', and may raise anything
        raise SkvError(f"this model's chat template cannot be applied: {one_line(error)}") from error
    return str(text)


def _on_that_day(tokenizer: Any) -> str:
    """The template with a clock of its own that stands still: since transformers 5.24 it cannot be given as a function.

    The line break belongs to the tag before it, so the template still begins at the beginning of a line.
    """
    codes = {f"%{dash}{code}": _TODAY.strftime(f"%{code}") for code in "aAbBcdHIjmMpSyYxX" for dash in ("", "-")}
    bare = {code: told.lstrip("0") if "-" in code and told.isdecimal() else told for code, told in codes.items()}
    replaced = "".join(f" | replace('{code}', '{told}')" for code, told in bare.items())
    clock = "{%- macro strftime_now(format) -%}{{- format" + replaced + " -}}{%- endmacro %}\n"
    return clock + str(tokenizer.get_chat_template())
