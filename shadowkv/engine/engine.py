"""One prefill, many caches: compute a prompt once, replay it into any method, decode.

Prefill runs on a fixed grid of chunks, also when it could be done in one pass. A prompt that shares a prefix with
the previous one keeps the whole chunks they have in common, and since every chunk is computed alone in any case,
the numbers are the same to the bit with or without that reuse.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowkv.anatomy.forward import check_ids, check_prompt, last_logits, logits_after
from shadowkv.anatomy.geometry import decoder_layers
from shadowkv.anatomy.rope import Rope
from shadowkv.anatomy.survey import survey
from shadowkv.common.errors import NotFiniteError, SkvError
from shadowkv.contract.method import Method
from shadowkv.contract.setting import require
from shadowkv.contract.sparse_prefill import SparsePrefill
from shadowkv.engine.cache import JoinedCache, MethodCache
from shadowkv.engine.graphs import GraphedStep, can_be_graphed, capture_on_gpu
from shadowkv.engine.recording import Recorded, Recording, placed
from shadowkv.engine.sampling import Choose, most_likely
from shadowkv.engine.snapshots import Kept, Prefill
from shadowkv.engine.streamed import StreamedPrompt
from shadowkv.tensors.host_memory import require_host_bytes
from shadowkv.tensors.pinned import HostRows
from shadowkv.tensors.streams import beside

# Small chunks waste less of a shared prefix; large ones keep a GPU busy.
_CHUNK_TOKENS = {"cpu": 256, "cuda": 8192}


class Engine:
    """Runs a transformers model through the caches of `shadowkv.engine.recording` and `shadowkv.engine.cache`.

    Raises `SkvError` for a model that cannot be run through them (`shadowkv.anatomy.survey`).

    prefill_chunk_tokens: grid of the prefill (default 256 on a CPU, 8192 on a GPU).
    reuse_prefix: keep what consecutive prompts share.
    record_queries: keep the prompt's queries for methods that need them (see `Method.needs_prompt_queries`).
    graphs: on a GPU, decode steps as CUDA graphs where they can be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        prefill_chunk_tokens: int | None = None,
        reuse_prefix: bool = True,
        record_queries: bool = False,
        graphs: bool = True,
    ) -> None:
        found = survey(model)
        self.model = model
        self.layers = found.layers
        self.rope = Rope(model, found)
        dims = found.dims(model.dtype.itemsize, model.device.type)
        self.dims = replace(dims, rotary=self.rope.knows(dims.layer_ids))
        self.prefill_chunk_tokens = prefill_chunk_tokens or _CHUNK_TOKENS.get(model.device.type, 8192)
        self._reuse_prefix = reuse_prefix
        self._record_queries = record_queries
        self._graphs = graphs
        self._kept: dict[SparsePrefill | None, Kept] = defaultdict(Kept)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, sparse: SparsePrefill | None = None) -> Prefill:
        """Compute the prompt, densely or by `sparse`; each keeps a snapshot of its own. input_ids [B,S] unpadded."""
        check_prompt(input_ids)
        check_ids(self.model, input_ids)
        input_ids = input_ids.to(self.model.device)
        ends = self._grid(input_ids.shape[1])
        kept = self._kept[sparse]
        if self._reuse_prefix and kept.prefill and kept.ids is not None and torch.equal(kept.ids, input_ids):
            kept.prefill.valid = False
            kept.prefill = replace(kept.prefill, reused_tokens=input_ids.shape[1], valid=True)
            return kept.prefill
        recording, start = self._begun(kept, input_ids, ends, sparse)
        kept.ids = None  # an interrupted prefill leaves nothing to reuse
        logits = None
        for begin, end in zip([0, *ends], ends, strict=False):
            if end > start:
                chunk = input_ids[:, begin:end]
                logits = last_logits(self.model, chunk, recording)
        assert logits is not None
        kept.recording, kept.ids = recording, input_ids.clone()  # the caller may write over its own
        kept.prefill = Prefill(recording, logits, input_ids.shape[1], start, sparse)
        return kept.prefill

    @torch.inference_mode()
    def replay(self, prefill: Prefill, method: Method) -> MethodCache:
        """The prompt as `method` keeps it. The prefill itself stays untouched."""
        if not prefill.valid:
            raise ValueError("this prefill was replaced by a later one")
        if prefill.sparse != method.prefill:
            raise ValueError(f"{method.label} wants another prefill than this one")
        require(
            self._record_queries or not method.needs_prompt_queries,
            f"{method.label} needs all queries of the prompt: make the engine with record_queries=True",
        )
        cache = self._made(prefill.recording, method, shared=True)
        cache.usable = lambda: prefill.valid
        return cache

    def stream(self, input_ids: Tensor, sparse: SparsePrefill | None = None) -> StreamedPrompt:
        """A prompt to `adopt`, [B,S] unpadded, whose layers are computed as they are asked for.

        No dense snapshot of it ever exists; the numbers are those of `prefill`. It shares no prefix with any other.
        """
        check_prompt(input_ids)
        check_ids(self.model, input_ids)
        return StreamedPrompt(
            self.model,
            self.layers,
            input_ids.to(self.model.device),
            self._grid(input_ids.shape[1]),
            sparse=sparse,
            record_queries=self._record_queries,
            ahead=int(self.model.device.type == "cuda"),
        )

    def snapshot_bytes(self, tokens: int) -> int:
        """What the recording of one prompt takes: dense keys and values of every layer, and queries if asked for."""
        held = sum(layer.token_bytes(self.dims.element_bytes) for layer in self.layers)
        return tokens * (held + (self.dims.query_bytes_per_token if self._record_queries else 0))

    @torch.inference_mode()
    def adopt(self, recorded: Recorded, method: Method, host_rows: HostRows | None = None) -> MethodCache:
        """A prompt from layers that this engine does not keep: each is asked for once, in order, and may go then.

        On a GPU caches are built on a side stream, so that a prompt that is streamed goes on meanwhile.
        host_rows: of the batch that the cache will be joined into.
        """
        with beside(self.model.device) as built:
            cache = self._made(recorded, method, shared=False, rows=host_rows)
        built()
        return cache

    def _made(self, recorded: Recorded, method: Method, *, shared: bool, rows: HostRows | None = None) -> MethodCache:
        method.check(self.dims)
        if method.speculates and len(decoder_layers(self.model)) != len(self.layers):
            raise SkvError(
                f"{method.core.name}: needs keys and values in every decoder layer, and some of this model share them"
            )
        if self.model.device.type == "cuda" and self.dims.layers and not (rows and rows.taken):
            longest = max(layer.tokens for layer in recorded.recorded)
            require_host_bytes(method.prompt_bytes(self.dims, longest).host, f"{method.label} of {longest} tokens")
        return MethodCache(self.model, placed(recorded, rows), method, self.rope, shared=shared)

    @torch.inference_mode()
    def join(self, rows: Sequence[MethodCache], method: Method) -> JoinedCache:
        """Caches as one batch, layer by layer; the rows are used up. They may differ in length, and be batches.

        With `forget` after each prefill, B prompts never need B dense snapshots at once.
        """
        return JoinedCache(self.model, method, rows)

    @torch.inference_mode()
    def keep(self, batch: JoinedCache, method: Method, rows: Sequence[int]) -> JoinedCache:
        """These rows of a batch, numbers ascending, as a batch of their own; the others, and `batch`, are gone."""
        return batch.keep(self.model, method, rows)

    def forget(self) -> None:
        """Let go of all snapshots: their buffers are freed, or belong to the caches that show views of them."""
        self._kept.clear()

    def extend(self, cache: MethodCache, input_ids: Tensor) -> Tensor:
        """Feed T new tokens, [B,T], and return the logits after the last one, [B,vocab] fp32."""
        return self._fed(cache, input_ids, 1)[:, 0]

    def force(self, cache: MethodCache, input_ids: Tensor) -> Tensor:
        """Feed T new tokens, [B,T], and return the logits after each, [B,T,vocab] fp32."""
        return self._fed(cache, input_ids, input_ids.shape[1])

    @torch.inference_mode()
    def _fed(self, cache: MethodCache, input_ids: Tensor, wanted: int) -> Tensor:
        if not cache.usable():
            raise ValueError("this cache failed in a step, or its prompt was replaced by a later prefill")
        check_ids(self.model, input_ids)
        usable, cache.usable = cache.usable, lambda: False  # a step that fails leaves some layers ahead of others
        logits = self._forward(input_ids.to(self.model.device), cache, wanted)
        cache.usable = usable
        cache.fed(input_ids.shape[1])
        return logits

    def _forward(self, input_ids: Tensor, cache: MethodCache, wanted: int) -> Tensor:
        known: dict[str, Any] = {}
        if cache.positions is not None:
            ahead = torch.arange(input_ids.shape[1], device=input_ids.device)
            known["position_ids"] = cache.positions.to(input_ids.device) + ahead
        return logits_after(self.model, input_ids, cache, wanted, **known)

    def stepper(self, cache: MethodCache) -> Callable[[Tensor], Tensor]:
        """What feeds [B,1] tokens to `cache` and returns the logits after them, [B,vocab] fp32.

        On a GPU a step is one CUDA graph, where the method and the model let it be; else it is `extend`.
        """
        if self.model.device.type == "cuda" and self._graphs and can_be_graphed(self.rope, cache):
            return GraphedStep(self.model, self.rope, cache, capture_on_gpu)
        return partial(self.extend, cache)

    def decode(
        self,
        cache: MethodCache,
        logits: Tensor,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        min_new_tokens: int = 0,
        choose: Choose = most_likely,
    ) -> list[list[int]]:
        """Tokens of each row, as `choose` picks them, until a stop token (left out) or `max_new_tokens`.

        Among the first `min_new_tokens` no stop token is chosen, however likely.

        `logits` [B,vocab] are those after the last token held, so a prompt's first new token is its prefill's under
        every method. The last token returned has not been fed to the model. Raises `NotFiniteError` instead of choosing
        from what overflowed.
        """
        self.rope.check_span(max(cache.row_tokens), max_new_tokens)
        rows: list[list[int]] = [[] for _ in range(logits.shape[0])]
        cache.reserve(max_new_tokens - 1)
        feed = self.stepper(cache)
        open_rows = set(range(len(rows)))
        for step in range(max_new_tokens):
            finite = torch.isfinite(logits).all()
            if step < min_new_tokens and stop_ids:
                ends = torch.tensor([i for i in sorted(stop_ids) if i < logits.shape[-1]], dtype=torch.long)
                logits = logits.index_fill(-1, ends.to(logits.device), -torch.inf)
            tokens = choose(logits)
            if not bool(finite):
                raise NotFiniteError(str(self.model.dtype).removeprefix("torch."), rows[0])
            for row, token in enumerate(tokens.tolist()):
                if token in stop_ids:
                    open_rows.discard(row)
                if row in open_rows:
                    rows[row].append(token)
            if not open_rows or step == max_new_tokens - 1:
                break
            logits = feed(tokens[:, None])
        return rows

    def generate(
        self, input_ids: Tensor, method: Method, max_new_tokens: int, stop_ids: Collection[int] = ()
    ) -> list[list[int]]:
        """Prefill, replay and decode in one call."""
        prefill = self.prefill(input_ids, method.prefill)
        return self.decode(self.replay(prefill, method), prefill.logits, max_new_tokens, stop_ids)

    def _grid(self, tokens: int) -> list[int]:
        """Where the chunks of a prompt end."""
        first = self.prefill_chunk_tokens
        for crossing in self.rope.crossings:
            if tokens > crossing:
                # A first chunk that stops short of the crossing would be rotated with the wrong frequencies.
                first = max(first, crossing + 1)
        return [*range(first, tokens, self.prefill_chunk_tokens), tokens]

    def _begun(
        self, kept: Kept, input_ids: Tensor, ends: list[int], sparse: SparsePrefill | None
    ) -> tuple[Recording, int]:
        """A recording to fill, and how many tokens of it are there: whole chunks shared with the previous prompt."""
        if kept.prefill is not None:
            kept.prefill.valid = False
        shared = kept.shared_tokens(input_ids) if self._reuse_prefix else None
        if shared is None or kept.recording is None or kept.ids is None:
            kept.recording = kept.prefill = None  # the old buffers go before the new ones come
            recording = Recording(self.layers, sparse, self._record_queries)
            for layer in recording.recorded:
                layer.reserve(input_ids.shape[1])
            return recording, 0
        before = self._grid(kept.ids.shape[1])
        start = max((end for end in ends if end <= shared and end in before), default=0)
        for layer in kept.recording.recorded:
            layer.rewind(start)
        return kept.recording, start
