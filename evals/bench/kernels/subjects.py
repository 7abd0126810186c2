"""What is measured of every kernel: its inputs, its twin, what it cannot do without moving, what else does the job.

Bytes are the fewest that a kernel can do with: every input read once, every output written once, nothing between its
parts. Of what it reads by index they are the rows that are asked for, those that several heads ask for counted once.

- chunk_scores: landmarks and queries, scores. choose_chunks: scores and chunk numbers, the chosen ones.
- plan_fill: chosen and held chunks, held chunks and slots to fill.
- fill_values: stored bytes of the missed tokens, over the link to the host; not what is then written on the device.
- fill_keys: coefficients (and scales) of the missed tokens, directions, cos and sin; the keys. Its FLOP are
  those of one product: the second one, which finds the partners of channels that lie in no usual way, is not counted.
- attend_resident: queries, and keys and values in use; outputs. FLOP: 4 per query head, position and channel.
  attend_codes: the same of codes and scales. No other way stands beside it: those of FlashInfer have one scale for all
  tokens, which is another result.
- page_bounds: extremes of all pages and queries, bounds. attend_pages: queries, keys and values of the pages that any
  head of a group asks for; outputs.
- low_rank.fit: none are counted, and no FLOP: most of its time goes into the eigenproblem, in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evals.bench.kernels import full_attention
from evals.bench.kernels.cases import (
    Case,
    attention_inputs,
    choose_inputs,
    codes_inputs,
    filling,
    key_inputs,
    llama_rotary,
    pages_inputs,
    plan_inputs,
    poisoned,
    scores_inputs,
    stored_values,
)
from evals.bench.kernels.fit import factorisation
from evals.bench.kernels.full_attention import Whole
from evals.bench.kernels.items import Item, Subject, Way, Workload
from evals.bench.kernels.staged_copy import staged_copy
from shadowkv.kernels import slots
from shadowkv.kernels.slots import Regions
from shadowkv.tensors.stored import Stored, to_host

_BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_SCORES_BOUND = 1e-4  # fp32 whatever the inputs are, whose products are exact


def items(work: Workload, kernels: Any) -> Iterator[Item]:
    """Everything there is to measure. kernels: the module of kernels, with the names of `shadowkv.kernels.slots`."""
    yield Item("chunk_scores", "", partial(_scores, work, kernels))
    yield Item("choose_chunks", "", partial(_choice, work, kernels))
    yield Item("plan_fill", "", partial(_plan, work, kernels))
    for coding in work.values:
        yield Item("fill_values", f"{coding}, from host memory", partial(_values, work, kernels, coding))
    for coding in work.factors:
        yield Item("fill_keys", f"{coding} factors", partial(_keys, work, kernels, coding))
    yield Item("attend_resident", "chosen tokens", partial(_attention, work, kernels))
    yield Item("attend_resident", "whole context", partial(_dense, work, kernels))
    for coding in ("int8", "fp8"):
        yield Item("attend_codes", f"{coding}, whole context", partial(_codes, work, kernels, coding))
    yield Item("page_bounds", "Quest's pages", partial(_bounds, work, kernels))
    yield Item("attend_pages", "Quest's pages", partial(_pages, work, kernels))
    yield Item("low_rank.fit", "one row's keys", partial(factorisation, work.case), "Gram, fp64")


def _scores(work: Workload, kernels: Any) -> Subject:
    case = replace(work.case, chunks=work.landmarks)
    inputs = scores_inputs(case, [case.chunks] * case.batch)
    rows = case.batch * case.heads * case.chunks
    return Subject(
        (lambda: kernels.chunk_scores(**inputs),),
        (lambda: slots.chunk_scores(**inputs),),
        _SCORES_BOUND,
        moved_bytes=inputs["landmarks"].nbytes + inputs["q"].nbytes + rows * torch.float32.itemsize,
        flop=2 * rows * case.group * case.head_dim,
    )


def _choice(work: Workload, kernels: Any) -> Subject:
    case = replace(work.case, chunks=work.landmarks)
    inputs = choose_inputs(case, torch.rand)
    chosen_bytes = case.batch * case.heads * case.slots * torch.int32.itemsize
    return Subject(
        (lambda: kernels.choose_chunks(**inputs),),
        (lambda: slots.choose_chunks(**inputs),),
        0.0,
        moved_bytes=inputs["scores"].nbytes + inputs["numbers"].nbytes + chosen_bytes,
    )


def _plan(work: Workload, kernels: Any) -> Subject:
    case = work.case
    inputs = plan_inputs(case, case.slots, case.slots, case.slots - work.misses)
    # By turns, so that every call misses as many as the first.
    turns = (inputs["chosen"], inputs["held"].sort(dim=-1).values)
    return Subject(
        tuple(partial(kernels.plan_fill, chosen) for chosen in turns),
        tuple(partial(slots.plan_fill, chosen) for chosen in turns),
        0.0,
        changed=(inputs["held"],),
        moved_bytes=4 * inputs["held"].nbytes,
    )


def _values(work: Workload, kernels: Any, coding: str) -> Subject:
    case = replace(work.case, values=coding)
    on_device = stored_values(case)
    stored = Stored(coding, tuple(to_host(part) for part in on_device.parts))
    plan = filling(case, work.misses)
    missed = case.batch * case.heads * work.misses * case.chunk
    return Subject(
        (partial(kernels.fill_values, stored, *plan.values()),),
        # The twin reads what is on the device: from the host it would copy every slot, missed or not.
        (partial(slots.fill_values, on_device, *plan.values()),),
        _BOUNDS[case.dtype],
        changed=(_blank(work, case),),
        moved_bytes=sum(missed * part.shape[-1] * part.itemsize for part in stored.parts),
        over_link=True,
        besides=(Way("staged copy", lambda: [partial(staged_copy(stored, missed), *plan.values())], False),),
    )


def _keys(work: Workload, kernels: Any, coding: str) -> Subject:
    case = replace(work.case, factors=coding)
    inputs = key_inputs(case, llama_rotary(case))
    plan = filling(case, work.misses)
    factors, rotary = inputs["factors"], inputs["rotary"]
    number = plan["held"].gather(-1, plan["fill"][..., : work.misses].long())
    asked = sum(len(row.unique()) for row in number) * case.chunk  # tokens, of each row
    places = len(number.unique()) * case.chunk
    written = number.numel() * case.chunk * case.head_dim
    of_token = [part[0, 0].nbytes for part in (factors.coefficients, factors.scale) if part is not None]
    read = asked * sum(of_token) + factors.vectors.nbytes
    read += places * (rotary.cos[0].nbytes + rotary.sin[0].nbytes)
    return Subject(
        (partial(kernels.fill_keys, factors, rotary, *plan.values()),),
        (partial(slots.fill_keys, factors, rotary, *plan.values()),),
        _BOUNDS[case.dtype],
        changed=(_blank(work, case),),
        moved_bytes=read + written * case.dtype.itemsize,
        flop=2 * written * case.rank,
    )


def _blank(work: Workload, case: Case) -> Tensor:
    shape = (case.batch, case.heads, work.regions.tokens, case.head_dim)
    return poisoned(torch.empty(shape, dtype=case.dtype, device=case.device))


def _attention(work: Workload, kernels: Any) -> Subject:
    regions, ring = work.regions, work.regions.ring
    # The ring is full and has turned.
    return _attending(work.case, kernels, regions, [regions.slots, regions.outliers, ring // 3, ring])[0]


def _dense(work: Workload, kernels: Any) -> Subject:
    tokens = work.case.tokens
    subject, inputs = _attending(work.case, kernels, Regions(0, 0, tokens), [0, 0, 0, tokens])
    asked = Whole(*(inputs[name] for name in ("q", "k", "v", "scaling")))
    return replace(subject, besides=full_attention.ways(asked, work.case.device))


def _attending(case: Case, kernels: Any, regions: Regions, span: list[int]) -> tuple[Subject, dict[str, Any]]:
    inputs = attention_inputs(case, regions, [span] * case.batch)
    exact = {name: inputs[name].float() if name in ("q", "k", "v") else inputs[name] for name in inputs}
    channels = case.batch * case.heads * (span[0] + span[1] + span[3]) * case.head_dim
    subject = Subject(
        (lambda: kernels.attend_resident(**inputs),),
        # In fp32, because weights as small as those of many tokens are hardly there in fp16.
        (lambda: slots.attend_resident(**exact).to(case.dtype),),
        _BOUNDS[case.dtype],
        moved_bytes=2 * channels * case.dtype.itemsize + 2 * inputs["q"].nbytes,
        flop=4 * channels * case.group,
    )
    return subject, inputs


def _codes(work: Workload, kernels: Any, coding: str) -> Subject:
    case = replace(work.case, values=coding)
    inputs = codes_inputs(case, [case.tokens] * case.batch)
    exact = inputs | {"q": inputs["q"].float()}
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    return Subject(
        (lambda: kernels.attend_codes(**inputs),),
        (lambda: slots.attend_codes(**exact).to(case.dtype),),
        _BOUNDS[case.dtype],
        moved_bytes=sum(part.nbytes for part in (*k.parts, *v.parts)) + 2 * q.nbytes,
        flop=4 * case.batch * case.heads * case.group * case.tokens * case.head_dim,
    )


def _bounds(work: Workload, kernels: Any) -> Subject:
    case, inputs = _paged(work)
    asked = {name: inputs[name] for name in ("q", "low", "high", "lengths", "page")}
    scores = case.batch * case.heads * case.group * case.chunks
    return Subject(
        (lambda: kernels.page_bounds(**asked),),
        (lambda: slots.page_bounds(**asked),),
        _SCORES_BOUND,
        moved_bytes=2 * inputs["low"].nbytes + inputs["q"].nbytes + scores * torch.float32.itemsize,
        flop=4 * scores * case.head_dim,
        error=_error_of_finite,
    )


def _pages(work: Workload, kernels: Any) -> Subject:
    case, inputs = _paged(work)
    asked = {name: inputs[name] for name in ("q", "k", "v", "pages", "lengths", "page", "scaling")}
    exact = {name: x.float() if name in ("q", "k", "v") else x for name, x in asked.items()}
    # Query heads that ask for the same page of a KV head need it once.
    by_head = inputs["pages"].unflatten(1, (case.heads, -1)).flatten(0, 1).flatten(1)
    wanted = sum(len(row[row >= 0].unique()) for row in by_head) * case.chunk * case.head_dim
    return Subject(
        (lambda: kernels.attend_pages(**asked),),
        (lambda: slots.attend_pages(**exact).to(case.dtype),),
        _BOUNDS[case.dtype],
        moved_bytes=2 * wanted * case.dtype.itemsize + 2 * inputs["q"].nbytes,
        flop=4 * int((inputs["pages"] >= 0).sum()) * case.chunk * case.head_dim,
    )


def _paged(work: Workload) -> tuple[Case, dict[str, Any]]:
    case = work.case
    return case, pages_inputs(case, [case.tokens - 1] * case.batch)


def _error_of_finite(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference over the largest magnitude, of what is finite; infinite if that is not the same."""
    left, right = got[0], wanted[0]
    finite = right.isfinite()
    if not torch.equal(left[~finite], right[~finite]):
        return float("inf")
    return float((left[finite] - right[finite]).abs().max() / right[finite].abs().max())
