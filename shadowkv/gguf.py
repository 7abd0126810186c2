"""GGUF to safetensors, once: transformers unpacks a GGUF file in half a minute, and loads the result in a second."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowkv.errors import SkvError
from shadowkv.wording import one_line

_MAGIC = b"GGUF"


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of `gguf` into `folder`, dense and in fp32 so that nothing is rounded again."""
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
