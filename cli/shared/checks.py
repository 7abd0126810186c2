"""Options that are refused without looking at any model."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cli.shared.options import RunOptions

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(dtype: str, known: Collection[str] = _DTYPES) -> None:
    """Refuse a type of weights that there is not."""
    from shadowkv.common.errors import SkvError
    from shadowkv.common.names import did_you_mean

    if dtype not in known:
        raise SkvError(f"unknown dtype '{dtype}'{did_you_mean(dtype, known)}; one of {', '.join(known)}")


def check_run(options: RunOptions) -> None:
    """Refuse options of a run that cannot work."""
    from shadowkv.common.errors import SkvError

    check_dtype(options.dtype)
    if options.budget is not None and options.kv_bytes is not None:
        raise SkvError("--budget and --kv-bytes would each decide what methods keep; give one of them")
    chunk = options.prefill_chunk_tokens
    if chunk is not None and chunk < 1:
        raise SkvError(f"--prefill-chunk must be at least 1, got {chunk}")
    if options.out is not None:
        check_writable(options.out)


def check_writable(out: Path) -> None:
    """Refuse an output folder that cannot be made, before minutes go into loading; opening the run decides."""
    from shadowkv.common.errors import SkvError

    there = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise SkvError(f"cannot write to {out}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SkvError(f"cannot write to {out}: no permission to write in {there}")
