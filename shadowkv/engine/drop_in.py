"""A method's cache for plain `model.generate`, which does not say where the prompt ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from shadowkv.anatomy.foresight import Foresight
from shadowkv.anatomy.rope import Rope
from shadowkv.anatomy.survey import survey
from shadowkv.common.dims import Bytes
from shadowkv.contract.method import Method
from shadowkv.engine.cache import MethodCache
from shadowkv.engine.recording import Recording


class DropInCache(MethodCache):
    """For plain `model.generate`: the first forward pass is recorded as the prompt, the second starts the method."""

    def __init__(self, model: PreTrainedModel, method: Method) -> None:
        found = survey(model)
        self._method, self._rope = method, Rope(model, found)
        dims = found.dims(model.dtype.itemsize, model.device.type)
        method.check(replace(dims, rotary=self._rope.knows(dims.layer_ids)))
        Cache.__init__(self, layers=[])
        self._recording: Recording | None = Recording(found.layers, method.prefill, method.needs_prompt_queries)
        self._shares, self.row_tokens = [], []
        self._foresight = Foresight(model, self) if method.speculates else None
        self.layers = self._recording.layers

    def nbytes(self) -> Bytes:
        """What the method holds or, before it has started, the recorded prompt."""
        if self._recording is None:
            return super().nbytes()
        return Bytes(sum(layer.nbytes() for layer in self._recording.recorded), 0)

    def close(self) -> None:
        self._recording = None
        super().close()

    def __bool__(self) -> bool:
        # Phi-3's generate throws away any true cache before a prompt longer than its short-frequency range; an
        # empty one has nothing that could have been rotated wrongly.
        return bool(self.get_seq_length() > 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._recording is not None and layer_idx == 0 and self._recording.recorded[-1].tokens:
            self.begin(self._recording, self._method, self._rope, self._recording.padding)
            self._recording = None
        return cast("tuple[Tensor, Tensor]", super().update(key_states, value_states, layer_idx, *args, **kwargs))


def new_cache(method: Method, model: PreTrainedModel) -> Cache:
    """A transformers cache for `model.generate(**inputs, cache=...)` (`past_key_values` before transformers 5.24).

    The first forward pass is taken as the prompt, computed densely; the next one starts the method.
    """
    return DropInCache(model, method)
