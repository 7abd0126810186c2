"""The model that a command names, before and after its weights are loaded."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cli.options import ModelOptions
    from shadowkv.loading import LoadedModel


class AskedModel:
    """What is known of a model without its weights. Raises `SkvError` where it cannot be had or driven."""

    def __init__(self, options: ModelOptions, *, dummy: bool = False) -> None:
        import torch

        from cli.fetching import fetch_weights, telling
        from shadowkv.geometry import dims_of
        from shadowkv.loading import context_tokens, load_config, pick_device, pick_dtype
        from shadowkv.resolving import resolve

        assert options.model is not None, "with_model gives one"
        self._dummy, self._trusted = dummy, options.trust_remote_code
        if not dummy:
            fetch_weights(options.model, offline=options.offline, silent=options.silent)
        with telling(silent=options.silent) as on_download:
            self.source = resolve(
                options.model,
                dummy=dummy,
                offline=options.offline,
                instead=options.instead,
                on_download=on_download,
            )
        self.config: Any = load_config(self.source, trust_remote_code=self._trusted)
        self.context_tokens = context_tokens(self.source, self.config)
        self.device = pick_device(options.device)
        self.dtype = pick_dtype(self.device, options.dtype)
        self.dims = dims_of(self.config, getattr(torch, self.dtype).itemsize, self.device.partition(":")[0])

    @cached_property
    def tokenizer(self) -> Any:
        from shadowkv.loading import load_tokenizer

        return load_tokenizer(self.source, trust_remote_code=self._trusted)

    def load(self) -> LoadedModel:
        """The model with its weights, on its device."""
        from shadowkv.loading import load_model

        return load_model(
            self.source, device=self.device, dtype=self.dtype, dummy=self._dummy, trust_remote_code=self._trusted
        )
