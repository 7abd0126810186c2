"""Model, tokenizer and config from the files that `resolving` found, with damage and absence said in one line."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowkv.common.errors import SkvError
from shadowkv.common.home import sha256_of
from shadowkv.common.reading import read_text
from shadowkv.common.wording import one_line, plain_line
from shadowkv.models.model_size import blueprint, count_parameters
from shadowkv.models.packs import kept_checksums, unused_tensors
from shadowkv.models.resolving import ModelSource
from shadowkv.models.weights import (
    not_loaded,
    only_an_adapter,
    stray_files,
    tensor_names,
    unexpected_tensors,
    weight_files,
    without_adapter,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from shadowkv.engine.self_check import SelfCheck
    from shadowkv.models.adapters import Adapter


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and everything a reader needs to know about where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    context_tokens: int
    weights_sha256: str | None  # None for random weights
    dummy: bool
    device: str
    dtype: str
    self_check: SelfCheck | None = None  # None if it was not asked for
    adapter: Adapter | None = None  # merged into the weights, of which the checksum above knows nothing
    not_loaded: tuple[str, ...] = ()  # tensors and files that were left aside, as was asked for

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those of the generation config and the tokenizer's own."""
        declared = getattr(self.model.generation_config, "eos_token_id", None)
        listed = declared if isinstance(declared, list) else [declared]
        return frozenset(int(i) for i in [*listed, self.tokenizer.eos_token_id] if i is not None)


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model, from its files or its preset."""
    from transformers import AutoConfig

    if source.folder is None:
        assert source.preset is not None
        return AutoConfig.for_model(source.preset.model_type, **source.preset.config_fields())
    if not (source.folder / "config.json").is_file() and (source.folder / "adapter_config.json").is_file():
        raise only_an_adapter(source.folder)
    if (path := source.folder / "config.json").is_file():
        read_text(path)  # names an encoding that is not UTF-8
    with _reading(source, "config.json"):
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, local_files_only=True)


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for a dummy without files, one token per byte."""
    from transformers import AutoTokenizer

    if source.folder is None:
        return _byte_tokenizer()
    with _reading(source, "the tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return tokenizer


def context_tokens(source: ModelSource, config: Any) -> int:
    """The longest sequence the model is made for: what its own config declares, never more than its preset.

    Raises `SkvError` for a model that declares none.
    """
    declared = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(declared, int):
        raise SkvError(
            f"{source.name} is of type {config.model_type}, which declares no longest sequence "
            "(max_position_embeddings): it is no RoPE decoder that skv can drive"
        )
    return declared if source.preset is None else min(declared, source.preset.context_tokens)


def load_model(
    source: ModelSource,
    *,
    device: str = "auto",
    dtype: str = "auto",
    dummy: bool = False,
    trust_remote_code: bool = False,
    allow_unexpected: Collection[str] = (),
) -> LoadedModel:
    """Load weights, or make random ones if `dummy`, in eval mode on `device`, which becomes the current one.

    dtype auto is fp32 on a CPU, where it is fastest, and bf16 on a GPU. allow_unexpected: glob patterns of what the
    files may hold and the model does not have.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = pick_device(device)
    dtype = pick_dtype(device, dtype)
    config = load_config(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # kernels are launched on the current one, whatever their tensors are on
    left: tuple[str, ...] = ()
    if dummy:
        parameters = count_parameters(blueprint(config, trust_remote_code=trust_remote_code)).total
        _check_room(parameters, torch_dtype, device)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype, trust_remote_code=trust_remote_code)
    else:
        assert source.folder is not None
        names = tensor_names(source.folder)
        beside = check_files(source, allow_unexpected)
        with _reading(source, "the weights"), without_adapter(source.folder) as folder:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch_dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                device_map=None if device == "cpu" else device,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        _check_complete(source, report)
        unexpected = unexpected_tensors(model, [*report["unexpected_keys"], *unused_tensors(source.folder)], names)
        left = not_loaded(source.name, source.folder, [*unexpected, *beside], allow_unexpected)
        if source.adapter is not None:
            from shadowkv.models.adapters import merged

            model = merged(model, source.adapter)
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        name=source.name,
        source=source.described,
        context_tokens=context_tokens(source, config),
        weights_sha256=None if dummy or source.folder is None else weights_sha256(source.folder),
        dummy=dummy,
        device=device,
        dtype=dtype,
        adapter=source.adapter,
        not_loaded=left,
    )


def check_files(source: ModelSource, allow_unexpected: Collection[str] = ()) -> tuple[str, ...]:
    """Files beside the weights that are left aside, as was allowed. Raises `SkvError` for any other, before a load."""
    assert source.folder is not None
    beside = stray_files(source.folder, None if source.adapter is None else source.adapter.folder)
    return not_loaded(source.name, source.folder, beside, allow_unexpected)


def pick_device(device: str) -> str:
    """`auto` is cuda where there is one; asking for an absent one is an error."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SkvError("--device cuda: this machine has no CUDA device that torch can use; leave it out for the CPU")
    try:
        return str(torch.device(device))
    except RuntimeError:
        raise SkvError(f"unknown device '{device}'; use auto, cpu or cuda") from None


def pick_dtype(device: str, dtype: str) -> str:
    """`auto` is fp32 on a CPU, where it is fastest, and bf16 elsewhere."""
    return ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype


def weights_sha256(folder: Path) -> str:
    """One checksum for all files that are loaded; the Hub's cache and pulled packs know theirs, the rest is read."""
    import hashlib

    known = kept_checksums(folder)
    sums = []
    for path in weight_files(folder):
        blob = path.resolve().name  # the Hub's cache names blobs by their sha256
        sums.append(known.get(path.name) or (blob if _is_sha256(blob) else sha256_of(path)))
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _check_complete(source: ModelSource, report: dict[str, Any]) -> None:
    """Refuse a model that is partly random: transformers fills what the files lack, and only warns."""
    wrong = {
        "lack": sorted(report["missing_keys"]),
        "have another shape of": sorted(str(key[0]) for key in report["mismatched_keys"]),
    }
    said = [f"{verb} {len(names)} tensors, {names[0]} first" for verb, names in wrong.items() if names]
    said += [f"cannot be loaded ({plain_line(message)})" for message in report.get("error_msgs") or ()]
    if said:
        raise SkvError(f"the weights of {source.name} do not fit its config.json: they {' and '.join(said)}")


def _check_room(parameters: int, dtype: Any, device: str) -> None:
    """Refuse random weights that cannot fit, before the machine swaps."""
    import torch

    need = parameters * dtype.itemsize
    if device == "cpu":
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        room = torch.cuda.mem_get_info(device)[0]
    if need > 0.9 * room:
        raise SkvError(
            f"{parameters / 1e9:.1f} billion parameters of {dtype.itemsize} bytes need {need / 2**30:.0f} "
            f"GiB, {device} has {room / 2**30:.0f} GiB; use a smaller model, --dtype bfloat16 or a GPU"
        )


@contextmanager
def _reading(source: ModelSource, what: str) -> Iterator[None]:
    """Say in one line that `what` cannot be read. Any exception counts: there is no end to what a damaged or
    unsupported file makes the libraries raise."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            said = f"{source.name} needs code from its repository; add --trust-remote-code if you trust its authors"
        else:
            said = f"{what} of {source.name} cannot be read: {one_line(error)}"
        raise SkvError(said) from error


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {symbol: i for i, symbol in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
