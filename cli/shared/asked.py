"""The model that a command names, before and after its weights are loaded."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cli.shared.options import WeightOptions
    from shadowkv.models.loading import LoadedModel


class AskedModel:
    """What is known of a model without its weights. Raises `SkvError` where it cannot be had or driven."""

    def __init__(self, options: WeightOptions, *, dummy: bool = False) -> None:
        import torch

        from cli.shared.fetching import fetch_weights, telling
        from shadowkv.common.errors import SkvError
        from shadowkv.models.loading import check_files, context_tokens, load_config, pick_device, pick_dtype
        from shadowkv.models.model_size import model_size
        from shadowkv.models.resolving import resolve, with_adapter

        assert options.model is not None, "with_model gives one"
        self.dummy, self._trusted, self._self_check = dummy, options.trust_remote_code, options.self_check
        allowed = ",".join(options.allow_unexpected_weights or ()).split(",")
        self._allowed = [pattern.strip() for pattern in allowed if pattern.strip()]
        if dummy and (options.adapter is not None or self._allowed):
            raise SkvError("--adapter and --allow-unexpected-weights are about weights, and --dummy loads none")
        if not dummy:
            fetch_weights(options.model, offline=options.offline, silent=options.silent)
        with telling(silent=options.silent) as on_download:
            found = resolve(
                options.model,
                dummy=dummy,
                offline=options.offline,
                instead=options.instead,
                on_download=on_download,
            )
        self.source = with_adapter(found, options.adapter)
        if not dummy:
            check_files(self.source, self._allowed)
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
        from shadowkv.models.loading import load_tokenizer

        return load_tokenizer(self.source, trust_remote_code=self._trusted)

    def load(self) -> LoadedModel:
        """The model with its weights, on its device. Raises `SkvError` for one that skv would not run as it is."""
        from dataclasses import replace

        from shadowkv.engine.self_check import remembered
        from shadowkv.models.loading import load_model
        from shadowkv.models.weights import check_weights_loaded

        loaded = load_model(
            self.source,
            device=self.device,
            dtype=self.dtype,
            dummy=self.dummy,
            trust_remote_code=self._trusted,
            allow_unexpected=self._allowed,
        )
        if not self._self_check:
            return loaded
        if not loaded.dummy and loaded.adapter is None:
            assert self.source.folder is not None
            check_weights_loaded(loaded.model, self.source.folder)
        known = None if loaded.adapter else loaded.weights_sha256
        return replace(loaded, self_check=remembered(loaded.model, known))
