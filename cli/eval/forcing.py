"""`--forced`: prompts of any benchmark with a continuation that is fed instead of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cli.shared.options import Settings

if TYPE_CHECKING:
    from evals.runs.task import Task


def check_forcing(settings: Settings) -> None:
    """Refuse what does not go with a forced continuation, or goes with nothing else."""
    from shadowkv.common.errors import SkvError

    if settings.forced is None:
        if settings.continuation is not None or settings.one_by_one:
            given = "--one-by-one" if settings.continuation is None else "--continuation"
            raise SkvError(f"{given} is about tokens that are forced: give --forced and how many")
        return
    if settings.stream:
        raise SkvError("--forced compares methods on a prompt that is kept, and --stream keeps none")
    if settings.temperature:
        raise SkvError("--temperature draws answers, and with --forced every method is fed the same tokens")
    if settings.diagnostics:
        raise SkvError("--diagnostics looks at answers, and with --forced there are none")


def forced(task: Task, settings: Settings) -> Task:
    """The task as it is, or with its answers forced."""
    from evals.fidelity.forced_task import ForcedTask
    from evals.runs.forced.forcing import Forcing

    if settings.forced is None:
        return task
    usual = "text" if task.benchmark == "fidelity" else "greedy"
    return ForcedTask(task, Forcing(settings.forced, settings.one_by_one), settings.continuation or usual)


def kind_of_records(task: Task) -> Any:
    """What its run folder holds."""
    from evals.runs.forced.record import ForcedRecord
    from evals.runs.results import Record

    return Record if task.forced is None else ForcedRecord
