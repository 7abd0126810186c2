"""How the prompts of a benchmark are answered: thought about first, drawn, several times. The prompts stay the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cli.shared.options import Settings
from cli.shared.sampling import sampling_of

if TYPE_CHECKING:
    from evals.common.chat import Chat
    from evals.runs.task import Task


def answered(task: Task, settings: Settings, chat: Chat | None, tokenizer: Any, context_tokens: int) -> Task:
    """The task, its prompts answered as asked for; the task itself for greedy answers without thoughts.

    Raises `SkvError` on a budget of thoughts where there are none, or for which there is no room.
    """
    from evals.runs.wrapping.sampled import SampledTask
    from evals.runs.wrapping.thinking import ThinkingTask
    from shadowkv.common.errors import SkvError

    markers, thought_tokens = chat.markers if chat else None, settings.thinking_tokens
    if thought_tokens is not None:
        if thought_tokens < 1:
            raise SkvError(f"--thinking-tokens must be at least 1, got {thought_tokens}")
        if chat is not None and markers is None:
            helps = "add --thinking on" if chat.thinking == "off" else "leave it out"
            raise SkvError(
                f"--thinking-tokens: this model's chat template lets it think nothing that can be told; {helps}"
            )
        if not settings.dry_run:
            _check_room(task, tokenizer, thought_tokens, context_tokens)
    if chat is not None and markers is not None:
        task = ThinkingTask(task, markers, chat.closing, thought_tokens)
    sampling = sampling_of(settings)
    return task if sampling is None else SampledTask(task, sampling)


def _check_room(task: Task, tokenizer: Any, thought_tokens: int, context_tokens: int) -> None:
    """Refuse thoughts that a model's context does not hold beside the longest prompt."""
    from evals.common.grouping import grouped
    from shadowkv.common.errors import SkvError

    turns = grouped(task.questions(tokenizer), task.prompt_of).values()
    needed = max(max(question.length_tokens for question in asked) + thought_tokens * len(asked) for asked in turns)
    if needed > context_tokens:
        raise SkvError(
            f"prompts and --thinking-tokens {thought_tokens} may take {needed} tokens, beyond this model's context of "
            f"{context_tokens}; give fewer, or shorter prompts"
        )
