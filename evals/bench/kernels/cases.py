"""Random inputs for every kernel and its plain-torch twin: small for Triton's interpreter, large for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shadowkv.anatomy.rotary_table import Pairing, RotaryTable
from shadowkv.kernels.slots import Factors, Regions, positions_in_use
from shadowkv.tensors.stored import CODINGS, Stored


@dataclass(frozen=True)
class Case:
    """Geometry of one comparison."""

    batch: int = 2
    heads: int = 2
    group: int = 2
    head_dim: int = 64
    chunks: int = 40
    slots: int = 8
    chunk: int = 8
    rank: int = 20
    dtype: torch.dtype = torch.float32
    values: str = "native"
    factors: str = "native"
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.chunks * self.chunk

    @property
    def width(self) -> int:
        """Of all heads' keys of one token."""
        return self.heads * self.head_dim

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


def poisoned(like: Tensor) -> Tensor:
    """A buffer in which nothing that was not written goes unnoticed."""
    return torch.full_like(like, float("nan"))


def scores_inputs(case: Case, counts: list[int]) -> dict[str, Any]:
    """Landmarks of which each row has as many as `counts` says; the others are NaN."""
    landmarks = case.randn(case.batch, case.heads, case.chunks, case.head_dim)
    for row, count in enumerate(counts):
        landmarks[row, :, count:] = float("nan")
    return {
        "q": case.randn(case.batch, case.heads * case.group, 1, case.head_dim),
        "landmarks": landmarks,
        "scaling": case.head_dim**-0.5,
        "counts": torch.tensor(counts, dtype=torch.int32, device=case.device),
    }


def choose_inputs(case: Case, make: Callable[..., Tensor]) -> dict[str, Any]:
    """Scores [B,H,C] as `make` gives them for that shape, of chunks with odd numbers.

    Rows lie as `chunk_scores` leaves them on a GPU, apart by a multiple of 64 bytes; NaN is between them.
    """
    shape = (case.batch, case.heads, case.chunks)
    scores = torch.nn.functional.pad(make(*shape).to(case.device), (0, -case.chunks % 16), value=torch.nan)[
        ..., : case.chunks
    ]
    numbers = (torch.arange(case.chunks, device=case.device) * 2 + 1).int().expand(shape).contiguous()
    return {"scores": scores, "numbers": numbers, "slots": case.slots}


def plan_inputs(case: Case, chosen: int, held: int, shared: int) -> dict[str, Tensor]:
    """`held` chunks in the first slots, of which `shared` are among the `chosen` ones."""
    rows = []
    for _ in range(case.batch * case.heads):
        numbers = torch.randperm(4 * case.slots)
        there = numbers[:held]
        new = torch.cat((there[torch.randperm(held)[:shared]], numbers[held : held + chosen - shared]))
        pad = torch.nn.functional.pad
        rows.append(
            (pad(new.sort().values, (0, case.slots - chosen), value=-1), pad(there, (0, case.slots - held), value=-1))
        )
    shape = (case.batch, case.heads, case.slots)
    wanted, have = (torch.stack(x).view(shape).int().to(case.device) for x in zip(*rows, strict=True))
    return {"chosen": wanted, "held": have}


def filling(case: Case, fills: int) -> dict[str, Any]:
    """Chunks in all slots, of which the first `fills` of a random order have to be filled."""
    rows = case.batch * case.heads
    held = torch.stack([torch.randperm(case.chunks)[: case.slots] for _ in range(rows)])
    fill = torch.stack([torch.randperm(case.slots)[:fills].sort().values for _ in range(rows)])
    fill = torch.nn.functional.pad(fill, (0, case.slots - fills), value=-1)
    shape = (case.batch, case.heads, case.slots)
    return {
        "held": held.view(shape).int().to(case.device),
        "fill": fill.view(shape).int().to(case.device),
        "chunk": case.chunk,
    }


def stored_values(case: Case) -> Stored:
    """Values of all tokens in the coding of the case, on its device."""
    x = case.randn(case.batch, case.heads, case.tokens, case.head_dim)
    return Stored(case.values, CODINGS[case.values].encode(x))


def llama_rotary(case: Case, theta: float = 10000.0) -> RotaryTable:
    """The rotary table of a Llama without scaled frequencies: channel d turns with channel d + D / 2."""
    half = case.head_dim // 2
    channel = torch.arange(case.head_dim, device=case.device)
    frequencies = theta ** -(torch.arange(half, device=case.device, dtype=torch.float64) / half)
    angles = torch.arange(case.tokens, device=case.device)[:, None] * frequencies
    sign = torch.where(channel < half, -1.0, 1.0)
    pair, partner = (channel % half).int(), ((channel + half) % case.head_dim).int()
    turns = angles.cos().to(case.dtype), angles.sin().to(case.dtype)
    return RotaryTable(*turns, pair, partner, sign, Pairing(half, neighbours=False))


def key_inputs(case: Case, rotary: RotaryTable) -> dict[str, Any]:
    """Low-rank factors of keys, in the coding of the case, and how their positions turn."""
    parts = CODINGS[case.factors].encode(case.randn(case.batch, case.tokens, case.rank))
    return {
        "factors": Factors(
            parts[0],
            parts[1] if len(parts) > 1 else None,
            case.randn(case.batch, case.rank, case.width) / case.rank**0.5,
        ),
        "rotary": rotary,
    }


def attention_inputs(case: Case, regions: Regions, spans: list[list[int]]) -> dict[str, Any]:
    """Queries and buffers in which every position that is not in use is NaN."""
    used = torch.tensor(spans, dtype=torch.int32, device=case.device)
    shape = (case.batch, case.heads, regions.tokens, case.head_dim)
    unused = ~positions_in_use(used, regions)[:, None, :, None].expand(shape)
    k, v = (case.randn(*shape).masked_fill(unused, float("nan")) for _ in range(2))
    q = case.randn(case.batch, case.heads * case.group, 1, case.head_dim)
    return {"q": q, "k": k, "v": v, "spans": used, "regions": regions, "scaling": case.head_dim**-0.5}


def codes_inputs(case: Case, lengths: list[int]) -> dict[str, Any]:
    """Keys and values in the coding of the case, of which rows hold `lengths` tokens; what is beyond reads as NaN."""
    rows = torch.tensor([[0, 0, 0, length] for length in lengths], dtype=torch.int32, device=case.device)
    held = rows[:, 3]  # as the engine keeps them
    beyond = torch.arange(case.tokens, device=case.device) >= held[:, None]
    shape = (case.batch, case.heads, case.tokens, case.head_dim)
    coded = []
    for x in (case.randn(*shape), case.randn(*shape)):
        codes, scales = CODINGS[case.values].encode(x)
        # In fp8 the byte 0x7F is NaN; in int8 only a scale can be.
        codes = codes.masked_fill(beyond[:, None, :, None], 0x7F)
        coded.append(Stored(case.values, (codes, scales.masked_fill(beyond[:, None, :, None], float("nan")))))
    q = case.randn(case.batch, case.heads * case.group, 1, case.head_dim)
    return {"q": q, "k": coded[0], "v": coded[1], "lengths": held, "scaling": case.head_dim**-0.5}


def pages_inputs(case: Case, lengths: list[int], shared: bool = False) -> dict[str, Any]:
    """Pages of `chunk` tokens, of which rows hold `lengths`, and lists of up to `slots` of them with the newest."""
    held = torch.tensor(lengths, dtype=torch.int32, device=case.device)
    there = torch.arange(case.tokens, device=case.device) < held[:, None]
    shape = (case.batch, case.heads, case.tokens, case.head_dim)
    k, v = (case.randn(*shape).masked_fill(~there[:, None, :, None], float("nan")) for _ in range(2))
    by_page = k.unflatten(2, (-1, case.chunk))  # of a page that is not full, extremes are NaN: not to be read
    lists = case.heads * (1 if shared else case.group)
    pages = torch.full((case.batch, lists, case.slots), -1, dtype=torch.int32, device=case.device)
    for row, length in enumerate(lengths):
        newest = (length - 1) // case.chunk
        for one in pages[row]:
            older = torch.randperm(newest)[: case.slots - 1].sort().values
            one[: len(older) + 1] = torch.cat((older, torch.tensor([newest]))).int()
    return {
        "q": case.randn(case.batch, case.heads * case.group, 1, case.head_dim),
        "k": k,
        "v": v,
        "low": by_page.amin(dim=3),
        "high": by_page.amax(dim=3),
        "pages": pages,
        "lengths": held,
        "page": case.chunk,
        "scaling": case.head_dim**-0.5,
    }
