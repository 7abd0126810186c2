"""Prompts that are too long lose their middle, because both ends may hold the instruction."""

from __future__ import annotations

from typing import Any

from shadowkv.common.errors import SkvError

_ROOM_TOKENS = 576  # the longest answer, 512 tokens, and a chat template


def without_middle(tokenizer: Any, text: str, limit_tokens: int) -> str:
    """`text`, or its first and last `limit_tokens // 2` tokens as text, joined (LongBench's pred.py)."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= limit_tokens:
        return text
    half = limit_tokens // 2
    ends = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return "".join(ends)


def checked_limit(asked: int | None, context_tokens: int, most: int | None = None) -> int:
    """The longest prompt before the chat template: as asked, or the authors' 3500 at 4K, 7500 at 8K, 31500 at 32K."""
    room = context_tokens - _ROOM_TOKENS
    if room < 2:
        raise SkvError(f"this model's context of {context_tokens} tokens is too short for LongBench")
    if asked is not None:
        if asked < 2:
            raise SkvError(f"--max-prompt-tokens must be at least 2, got {asked}")
        if asked > room:
            raise SkvError(
                f"--max-prompt-tokens {asked} leaves no room for template and answer in this model's context of "
                f"{context_tokens} tokens; at most {room}"
            )
        return asked
    limit = min(max(1000 * (context_tokens // 1024) - 500, context_tokens // 4), room)
    return limit if most is None else min(limit, most)
