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

        from cli.render import quieten_libraries
        from shadowkv.loading import context_tokens, load_config, pick_device, pick_dtype
        from shadowkv.model_size import model_size
        from shadowkv.resolving import resolve

        quieten_libraries()
        self._dummy, self._trusted, self._self_check = dummy, options.trust_remote_code, options.self_check
        self.source = resolve(options.model, dummy=dummy)
        self.config: Any = load_config(self.source, trust_remote_code=self._trusted)
        self.context_tokens = context_tokens(self.source, self.config)
        self.device = pick_device(options.device)
        self.dtype = pick_dtype(self.device, options.dtype)
        self.size = model_size(
            self.config,
            getattr(torch, self.dtype).itemsize,
            device=self.device.partition(":")[0],
            trust_remote_code=self._trusted,
        )
        self.dims = self.size.dims

    @cached_property
    def tokenizer(self) -> Any:
        from shadowkv.loading import load_tokenizer

        return load_tokenizer(self.source, trust_remote_code=self._trusted)

    def load(self) -> LoadedModel:
        """The model with its weights, on its device. Raises `SkvError` for one that skv would not run as it is."""
        from dataclasses import replace

        from shadowkv.loading import load_model
        from shadowkv.self_check import remembered

        loaded = load_model(
            self.source, device=self.device, dtype=self.dtype, dummy=self._dummy, trust_remote_code=self._trusted
        )
        if not self._self_check:
            return loaded
        return replace(loaded, self_check=remembered(loaded.model, loaded.weights_sha256))
