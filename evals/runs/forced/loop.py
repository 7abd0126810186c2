"""Forced continuations: every method is fed the same tokens, and its distributions are held to full attention's.

T tokens at once give what T steps give, since every method makes a selection for each of them
(`shadowkv.contract.method.DecodeCache.attend`); they are fed so, and the weights are read once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from evals.common.grouping import grouped
from evals.runs.failures import FAILURES, located, status_of
from evals.runs.forced.distributions import Distances, Distributions, distances, joined, keep, kept_of, tokens_at_once
from evals.runs.forced.forcing import Forcing
from evals.runs.forced.record import ForcedRecord
from evals.runs.run import Run
from evals.runs.task import Example
from shadowkv.common.errors import NotFiniteError, SkvError
from shadowkv.common.wording import one_line
from shadowkv.contract.method import Method
from shadowkv.contract.sparse_prefill import SparsePrefill
from shadowkv.engine.cache import MethodCache
from shadowkv.engine.engine import Engine
from shadowkv.engine.snapshots import Prefill
from shadowkv.methods.full.method import Full

_DIGITS = 5  # of what a record keeps: rounding of the model is coarser


@dataclass(frozen=True)
class _Reference:
    """What full attention makes of one prompt."""

    fed: Tensor  # [1,N] the continuation
    coming: Tensor  # [N] what comes after each
    full: Distributions
    nll: list[float]


def forced_answers(run: Run, forcing: Forcing, example: Example, methods: Sequence[Method]) -> Iterator[ForcedRecord]:
    """One record per method, all from one computation of the prompt and one of full attention's distributions."""
    asked = next(turn for turn in example.turns if turn.references or turn.continuation)
    blank = _blank(run.task.benchmark, asked)
    prompt = [token for turn in example.turns[: example.turns.index(asked) + 1] for token in turn.input_ids]
    try:
        prefill, prefill_s = _prefilled(run, example, None)
        reference = _reference(run, forcing, example, asked, prefill)
    except FAILURES as failure:
        told = located(run.engine, prompt, failure)
        yield from (_failed(replace(blank, method=method.label), told) for method in methods)
        return
    blank = replace(blank, prompt_sha256=_sha256([*prompt, *reference.fed[0].tolist()]))
    for sparse, alike in grouped(methods, lambda method: method.prefill).items():
        for method in alike:
            named = replace(blank, method=method.label)
            try:
                if prefill.sparse != sparse:
                    prefill, prefill_s = _prefilled(run, example, sparse)
                yield _forced(run, forcing, example, prefill, reference, method, replace(named, prefill_s=prefill_s))
            except FAILURES as failure:
                yield _failed(named, located(run.engine, prompt, failure))


def _prefilled(run: Run, example: Example, sparse: SparsePrefill | None) -> tuple[Prefill, float]:
    began = run.now()
    prefill = run.engine.prefill(torch.tensor([example.input_ids]), sparse)
    return prefill, run.now() - began


@contextmanager
def _asked(engine: Engine, example: Example, prefill: Prefill, method: Method) -> Iterator[tuple[MethodCache, Tensor]]:
    """The prompt as a method holds it, with a question that comes after it fed; and the logits [1,vocab] then."""
    with closing(engine.replay(prefill, method)) as cache:
        logits = prefill.logits
        for turn in example.later:
            logits = engine.extend(cache, torch.tensor([turn.input_ids]))
            if turn.references:
                break
        yield cache, logits


def _reference(run: Run, forcing: Forcing, example: Example, asked: Example, prefill: Prefill) -> _Reference:
    """Full attention over what follows in the text, or over the answer that it gives itself."""
    engine, tokens, following = run.engine, forcing.tokens, asked.continuation
    if 0 < len(following) <= tokens:
        raise SkvError(f"{len(following)} tokens follow this prompt, and {tokens} forced ones need one more")
    if not following:
        with _asked(engine, example, prefill, Full()) as (cache, logits):
            stop_ids = run.loaded.stop_ids.union(asked.stop_ids)
            answer = engine.decode(cache, logits, min(tokens, asked.max_new_tokens), stop_ids)[0]
        if not answer:
            raise SkvError("full attention's answer is empty: nothing can be forced")
    fed = torch.tensor([following[:tokens] or answer])
    kept, nll, coming = list[Distributions](), list[float](), list[Tensor]()
    with _asked(engine, example, prefill, Full()) as (cache, _):
        for start, logits in _pieces(engine, cache, forcing, fed, prefill.logits.shape[1]):
            own = kept_of(logits, fed.shape[1])
            then = slice(start + 1, start + 1 + len(logits))
            coming.append(torch.tensor(following[then], device=logits.device) if following else own.top[:, 0])
            kept.append(own)
            nll += (-logits.log_softmax(dim=-1).gather(1, coming[-1][:, None])[:, 0]).tolist()
    return _Reference(fed, torch.cat(coming), keep(kept), nll)


def _pieces(
    engine: Engine, cache: MethodCache, forcing: Forcing, fed: Tensor, vocabulary: int
) -> Iterator[tuple[int, Tensor]]:
    """Feed a continuation [1,N]: places from which on, and the logits [T,vocab] after each of T tokens there."""
    engine.rope.check_span(max(cache.row_tokens), fed.shape[1])
    size = 1 if forcing.one_by_one else tokens_at_once(vocabulary)
    for start in range(0, fed.shape[1], size):
        logits = engine.force(cache, fed[:, start : start + size])[0]
        finite = torch.isfinite(logits).all(dim=-1)
        if not bool(finite.all()):
            first = start + int(finite.int().argmin())
            raise NotFiniteError(str(engine.model.dtype).removeprefix("torch."), fed[0, : first + 1].tolist())
        yield start, logits


def _forced(
    run: Run,
    forcing: Forcing,
    example: Example,
    prefill: Prefill,
    reference: _Reference,
    method: Method,
    blank: ForcedRecord,
) -> ForcedRecord:
    engine, began, parts = run.engine, run.now(), list[Distances]()
    with _asked(engine, example, prefill, method) as (cache, _):
        built = run.now()
        held, tokens = cache.nbytes(), cache.get_seq_length()
        for start, logits in _pieces(engine, cache, forcing, reference.fed, reference.full.vocabulary):
            parts.append(distances(reference.full, start, logits, reference.coming[start : start + len(logits)]))
        ended = run.now()
    found, prompt_tokens = joined(parts), len(example.input_ids)
    return replace(
        blank,
        status="ok",
        prompt_tokens=tokens,
        reused_tokens=prefill.reused_tokens,
        kl=_rounded(found.kl),
        nll=_rounded(found.nll),
        full_nll=_rounded(reference.nll),
        top1=found.top1,
        top5=found.top5,
        rank=found.rank,
        compared=reference.full.described,
        build_s=built - began,
        force_s=ended - built,
        device_bytes=held.device,
        host_bytes=held.host,
        attended_tokens=method.attended_tokens(engine.dims, prompt_tokens, tokens - prompt_tokens),
        bus_bytes=method.bus_bytes(engine.dims, tokens),
    )


def _blank(benchmark: str, asked: Example) -> ForcedRecord:
    return ForcedRecord(
        benchmark=benchmark,
        task=asked.task,
        length=asked.length_tokens,
        sample=asked.sample,
        method="",
        status="error",
        error=None,
        prompt_tokens=0,
        reused_tokens=0,
        kl=[],
        nll=[],
        full_nll=[],
        top1=[],
        top5=[],
        rank=[],
        compared="",
        prefill_s=0.0,
        build_s=0.0,
        force_s=0.0,
        device_bytes=0,
        host_bytes=0,
        prompt_sha256=_sha256(asked.input_ids),
        meta=dict(asked.meta),
        question=asked.place,
    )


def _failed(blank: ForcedRecord, failure: BaseException) -> ForcedRecord:
    return replace(blank, status=status_of(failure), error=one_line(failure))


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def _sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()
