"""What a layer's query would be if it saw what the layer before it saw: the guess that InfiniGen prefetches by.

The guess runs the layer's own code (norm, projection, query norm, RoPE) on the earlier layer's input and stops where
it asks for attention, so it works for every decoder that transformers can drive through an attention function. Two
hidden states are remembered while a forward pass lasts, and only of passes that decode through one given cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from shadowkv.anatomy.attention import with_handle
from shadowkv.anatomy.geometry import decoder_layers
from shadowkv.common.errors import SkvError
from shadowkv.common.ranges import ranged


class _Caught(Exception):  # noqa: N818 - it ends a guess, it reports no error
    """Carries the query out of a layer whose remaining work is not wanted."""

    def __init__(self, q: Tensor) -> None:
        super().__init__()
        self.q = q


class _Probe(Cache):
    """A cache that holds nothing and stops the layer as soon as its query is known."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return with_handle(key_states, self), value_states

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> NoReturn:
        raise _Caught(q)


class Foresight:
    """Hooks on the decoder layers of `model`, until `close()` or the end of `cache`, whose passes it watches."""

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self._cache = weakref.ref(cache)
        self._layers = decoder_layers(model)
        self._inputs: dict[int, Tensor] = {}  # of the layer that runs and of the one before it
        self._run: Callable[[Tensor, Cache], Any] | None = None  # runs a layer with the arguments of the one that runs
        self._guesses: dict[int, Tensor] = {}  # rows of a padded batch ask one after the other
        hooks = [
            layer.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            for index, layer in enumerate(self._layers)
        ]
        self._hooks = [*hooks, self._layers[-1].register_forward_hook(self._leave)]
        # Hooks on the model outlive a cache that nobody closes, but must not keep it alive.
        weakref.finalize(cache, self.close).atexit = False

    @ranged("selection")
    def query(self, layer: int, seen_by: int) -> Tensor:
        """The query, after RoPE, that `layer` makes of the input of layer `seen_by`. [B,Hq,T,D].

        Can be asked while `layer` runs, of itself and of the layer before it.
        """
        if seen_by not in self._inputs or layer not in self._inputs:
            raise SkvError("infinigen cannot see the layers of this model at work: it is not called through its cache")
        if seen_by not in self._guesses:
            # `forward` itself: calling the layer would run hooks, this object's own among them.
            assert self._run is not None
            try:
                self._run(self._inputs[seen_by], _Probe())
            except _Caught as caught:
                self._guesses[seen_by] = caught.q
        return self._guesses[seen_by]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._leave()

    def _enter(self, index: int, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        cache = self._cache()
        # Found by what it is: what layers call it, and where they want it, changes.
        if cache is None or not any(given is cache for given in (*args, *kwargs.values())):
            return
        hidden = args[0] if args else kwargs["hidden_states"]

        def run(seen: Tensor, probe: Cache) -> Any:
            instead = {id(hidden): seen, id(cache): probe}
            positional = [instead.get(id(given), given) for given in args]
            named = {name: instead.get(id(given), given) for name, given in kwargs.items()}
            return layer.forward(*positional, **named)

        self._inputs = {i: x for i, x in self._inputs.items() if i == index - 1} | {index: hidden}
        self._run, self._guesses = run, {}

    def _leave(self, *_: object) -> None:
        self._inputs, self._run, self._guesses = {}, None, {}
