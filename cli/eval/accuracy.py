"""What every accuracy benchmark of the command line shares: settings, checks before anything heavy, run, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cli.eval.answered import answered
from cli.eval.answering import answering, check_workers, processes
from cli.eval.forcing import check_forcing, forced, kind_of_records
from cli.shared.asked import AskedModel
from cli.shared.options import Settings
from cli.shared.sampling import sampling_of
from cli.shared.which_model import with_model

if TYPE_CHECKING:
    from evals.common.chat import Chat
    from evals.runs.manifest import Circumstances, Manifest
    from evals.runs.runner import Answered
    from evals.runs.task import Question, Task
    from shadowkv.contract.method import Method

    # What is known of the model -> the task, or an error about a length beyond its context.
    MakeTask = Callable[[AskedModel], Task]


class _Prepared(AskedModel):
    """Everything that can be known, and refused, before weights are loaded."""

    def __init__(self, make_task: MakeTask, settings: Settings) -> None:
        from cli.shared.calibrations import on_calibrations
        from cli.shared.checks import check_run
        from cli.shared.choosing import choose, parse_budgets, parse_kv_bytes, parse_specs, with_engine
        from cli.shared.fetching import fetch_missing
        from evals.common.asking.question import IN_PROMPT
        from evals.runs.wrapping.placed import asking
        from shadowkv.common.errors import SkvError

        sampling_of(settings)
        asked = with_engine(parse_specs(settings.methods or ()), settings.engine)
        alike = parse_budgets(settings.budget)
        check_run(settings)
        if settings.stream and settings.diagnostics:
            raise SkvError("--diagnostics compares layers of a prompt that is kept, and --stream keeps none")
        check_forcing(settings)
        settings = with_model(settings)
        super().__init__(settings, dummy=settings.dummy)
        check_workers(settings.workers, self.device)
        self.settings = settings
        self.task = asking(make_task(self), settings.question or IN_PROMPT)
        fetch_missing(self.task.needs(), offline=settings.offline, silent=settings.silent)
        self.chat = self._chat()
        how = answered(self.task, settings, self.chat, self.tokenizer, self.context_tokens)
        self.task = forced(how, settings)
        if settings.kv_bytes is not None:
            longest = max(question.length_tokens for question in self.questions)
            alike = parse_kv_bytes(settings.kv_bytes, self.dims, longest)
        asked, uncalibrated = on_calibrations(asked, self, settings, make=not settings.dry_run)
        self.chosen = choose(asked, alike, self.source, self.dims, uncalibrated)
        self.methods, self.unsupported = self.chosen.methods, self.chosen.unsupported

    def _chat(self) -> Chat | None:
        """The template that prompts are put into; raises where it cannot be had as asked for."""
        from evals.common.chat import Chat
        from shadowkv.common.errors import SkvError

        if self.task.chat_answer_tokens():
            return Chat(self.tokenizer, self.settings.thinking)
        for option, given in (("--thinking", "auto"), ("--thinking-tokens", None)):
            if getattr(self.settings, option[2:].replace("-", "_")) != given:
                raise SkvError(
                    f"{option} is about the chat template, and no prompt of these is put into it; leave it out"
                )
        return None

    @property
    def chat_notes(self) -> list[str]:
        """What is to be said of the template."""
        return self.chat.notes(self.task.chat_answer_tokens(), self.settings.thinking_tokens) if self.chat else []

    @property
    def records_queries(self) -> bool:
        """Whether any method needs all queries of a prompt."""
        return any(method.needs_prompt_queries for method in self.methods)

    @cached_property
    def questions(self) -> Sequence[Question]:
        return self.task.questions(self.tokenizer)

    @cached_property
    def left_out(self) -> dict[str, str]:
        return self.task.left_out(self.tokenizer)


def run(make_task: MakeTask, settings: Settings) -> int:
    """Run or continue a benchmark and show its results; returns the exit code."""
    from cli.shared.choosing import tell_unsupported
    from shadowkv.common.wording import plain_line

    ready = _Prepared(make_task, settings)
    settings = ready.settings
    questions = ready.questions
    tell_left_out(ready.left_out)
    tell_unsupported(ready.unsupported)
    if not settings.quiet:
        tell_notes(ready.chat_notes)
    if settings.dry_run:
        return _plan(ready)
    unscored = _run(ready, questions)
    for record in unscored if not settings.quiet else []:
        said = f"{record.method} @ {record.length} {record.task} {record.sample}: {record.error}"
        print(f"skv: unscored: {plain_line(said)}", file=sys.stderr)
    return 1 if unscored or ready.left_out or ready.unsupported else 0


def _run(ready: _Prepared, questions: Sequence[Question]) -> list[Answered]:
    """Answer what is open, report, and return the records of these questions that have no score."""
    from cli.shared.render import print_summary, progress
    from evals.reporting.files import write_run
    from evals.runs.results import open_records

    settings = ready.settings
    with ExitStack() as held:
        told, answer = held.enter_context(answering(settings, ready.task, questions, ready.methods))
        manifest = _manifest(ready, told)
        path = settings.out or Path("results") / manifest.folder_name
        folder = held.enter_context(open_records(path, manifest, kind_of_records(ready.task)))
        if folder.repaired_lines and not settings.quiet:
            print(f"skv: repaired an unfinished last line of {folder.file}", file=sys.stderr)
        with progress(shown=not (settings.quiet or settings.as_json)) as on_step:
            answer(folder, on_step)
        section, files = write_run(path)
        unscored = _unscored(list(folder.records.values()), questions, ready.methods)
    if settings.as_json:
        summary = {"folder": str(path), "benchmark": manifest.benchmark, "model": manifest.model}
        rest = {
            "notes": manifest.notes,
            "rows": [asdict(row) for row in section.rows],
            "tables": [asdict(table) for table in section.tables[1:]],
            "unscored": len(unscored),
            "left_out": ready.left_out,
            "unsupported": ready.unsupported,
        }
        print(json.dumps({**summary, **rest}, indent=1))
    elif not settings.quiet:
        print_summary(section)
        names = [str(file.relative_to(path)) for file in files]
        print(f"{path}: run.json {folder.file.name} {' '.join(names)}")
    return unscored


def _plan(ready: _Prepared) -> int:
    """Show what a run would do: prompts and their token counts, memory per method."""
    from cli.shared.render import print_table, status
    from evals.common.grouping import grouped
    from evals.tables.table import Table, mib, tokens
    from shadowkv.models.model_size import streamed_bytes

    settings = ready.settings
    prompts = []
    with status("measuring prompts", quiet=settings.quiet or settings.as_json) as update:
        for example in ready.task.examples(ready.tokenizer, ready.questions):
            tokens_before = len(example.input_ids) + len(example.fed or ())
            counts = {"prompt_tokens": tokens_before, "max_new_tokens": example.max_new_tokens}
            prompts.append({**example.question._asdict(), **counts})
            update(f"{len(prompts)}/{len(ready.questions)}")
    longest = max(prompt["prompt_tokens"] for prompt in prompts)
    planned = {method.label: method.prompt_bytes(ready.dims, longest) for method in ready.methods}
    memory = {label: {"device_bytes": held.device, "host_bytes": held.host} for label, held in planned.items()}
    weights = ready.size.weight_bytes
    snapshots = len({method.prefill for method in ready.methods})
    queries = ready.dims.query_bytes_per_token if ready.records_queries else 0
    prefill = (ready.dims.full_bytes_per_token + queries) * longest * snapshots
    if settings.stream:
        prefill = streamed_bytes(ready.dims, ready.size.hidden, longest, with_queries=ready.records_queries)
    if settings.as_json:
        told = {"model": ready.source.name, "source": ready.source.described, "examples": prompts, "methods": memory}
        costs = {"weights_bytes": weights, "prefill_kv_bytes": prefill, "answers": len(ready.questions) * len(memory)}
        print(json.dumps({**told, **costs}, indent=1))
        return 0
    each = f" x {settings.answers} answers" if settings.answers else ""
    cells = grouped(prompts, lambda p: (p["task"], p["length_tokens"], p["max_new_tokens"]))
    lines = []
    for (task, length, answer), same in cells.items():
        sizes = [prompt["prompt_tokens"] for prompt in same]
        spans = [f"{min(sizes) + more}–{max(sizes) + more}" for more in (0, answer)]
        lines.append([task, tokens(length), str(len(same)), *spans])
    print_table(
        Table(
            f"{ready.source.name} ({ready.source.described}): {len(prompts)} prompts x {len(memory)} methods{each}",
            ["task", "length", "prompts", "prompt tokens", "with the answer"],
            lines,
        )
    )
    print_table(
        Table(
            f"planned KV memory at {longest} tokens",
            ["method", "device MiB", "host MiB"],
            [[label, *map(mib, held)] for label, held in planned.items()],
            f"Weights {weights / 2**30:.2f} GiB, prefill {prefill / 2**30:.2f} GiB. Nothing was run.",
        )
    )
    if longest > ready.context_tokens:
        beyond = f"beyond this model's context of {ready.context_tokens}"
        print(f"skv: note: prompts of {longest} tokens are {beyond} and cannot be run", file=sys.stderr)
    return 0


def tell_notes(notes: Sequence[str]) -> None:
    """Say on stderr what is also said in every table."""
    for note in notes:
        print(f"skv: note: {note}", file=sys.stderr)


def tell_left_out(left_out: dict[str, str]) -> None:
    """Name the tasks that cannot be run here, those of one reason together."""
    from shadowkv.common.wording import plain_line

    for line in _left_out_lines(left_out):
        print(f"skv: {plain_line(line)}", file=sys.stderr)


def _left_out_lines(left_out: dict[str, str]) -> list[str]:
    """One for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"left out: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _manifest(ready: _Prepared, told: Circumstances) -> Manifest:
    from cli.shared.choosing import untouched_note
    from evals.runs.manifest import Manifest, described, method_notes, plain, unchecked_note, weight_notes

    task = ready.task
    streamed = {"streamed": True} if ready.settings.stream else {}
    switched = ready.chat.config() if ready.chat else {}
    notes = ["dummy weights: scores mean nothing, only times and bytes do"] if told.model["dummy"] else []
    if ready.settings.stream:
        notes.append(
            "prompts were computed for each method anew, not once for all, and caches built meanwhile: prefill is both"
        )
    if (count := processes(ready.settings, ready.questions)) > 1:
        notes.append(f"answered by {count} processes side by side: times are of a shared machine")
    notes += [*unchecked_note(told.session), *weight_notes(told.model), *ready.chat_notes]
    notes += task.notes()
    notes += method_notes(ready.methods)
    notes += _left_out_lines(ready.left_out)
    notes += [f"unsupported: {label}: {why}" for label, why in ready.unsupported.items()]
    notes += untouched_note(ready.chosen, ready.settings)
    return Manifest(
        benchmark=task.benchmark,
        config=plain({**task.config(), "prefill_chunk_tokens": told.prefill_chunk_tokens, **streamed, **switched}),
        methods={method.label: plain(described(method)) for method in ready.methods},
        selection=plain(task.selection()),
        model=told.model,
        sources=task.sources(),
        notes=notes,
        sessions=[told.session],
    )


def _unscored(records: list[Answered], questions: Sequence[Question], methods: list[Method]) -> list[Answered]:
    """Failed records of what this command asked for."""
    asked, labels = set(questions), {method.label for method in methods}
    wanted = [r for r in records if r.asked in asked and r.method in labels]
    return [r for r in wanted if not r.final]
