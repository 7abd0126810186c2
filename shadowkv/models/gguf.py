"""GGUF to safetensors, once: transformers unpacks a GGUF file in half a minute, and loads the result in a second."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shadowkv.common.errors import SkvError
from shadowkv.common.wording import one_line

_MAGIC = b"GGUF"


def convert(gguf: Path, folder: Path) -> list[str]:
    """Write the model and tokenizer of `gguf` into `folder`, dense and in fp32 so that nothing is rounded again.

    Returns the names of tensors that found no place in the model: transformers passes over those without a word.
    """
    with gguf.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise SkvError(f"{gguf} is not a GGUF file")
    options = {"gguf_file": gguf.name}
    # Recent versions keep the weights packed unless asked; older ones always unpack and know no such option.
    config_class = getattr(transformers, "GgufConfig", None)
    dense = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype="float32", output_loading_info=True, **options, **dense
        )
    except Exception as error:  # there is no end to what a damaged file makes its readers raise
        raise SkvError(f"{gguf} cannot be read as a GGUF model: {one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random values, and only warn
        raise SkvError(f"{gguf} lacks {len(missing)} tensors of its architecture, {missing[0]} first")
    unused = _unused(gguf, model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [*unused, *sorted(report["unexpected_keys"])]


def _unused(gguf: Path, model: PreTrainedModel) -> list[str]:
    """Tensors whose numbers the model does not have: conversion moves numbers about, and makes or drops none."""
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    reader = GGUFReader(gguf)
    left = sum(int(tensor.n_elements) for tensor in reader.tensors) - sum(p.numel() for p in model.parameters())
    if left <= 0:
        return []
    field = reader.fields["general.architecture"]
    called = bytes(field.parts[field.data[0]]).decode()
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == called)
    names = get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)
    split = (name.rpartition(".") for name, _ in model.named_parameters())
    known = {f"{names.get_name(stem)}.{suffix}" for stem, _, suffix in split}
    # Experts are packed, so the library's map does not know their names here.
    unknown = sorted(t.name for t in reader.tensors if t.name not in known and "_exps." not in t.name)
    return unknown or [f"tensors of {left} numbers in all"]
