"""Every kernel by the name of its plain-torch twin in `shadowkv.kernels.slots`. Importing this needs Triton."""

from shadowkv.kernels.attention import attend_resident
from shadowkv.kernels.choose import choose_chunks, plan_fill
from shadowkv.kernels.coded.attention import attend_codes
from shadowkv.kernels.fetch import fill_values
from shadowkv.kernels.pages import attend_pages, page_bounds
from shadowkv.kernels.rebuild import fill_keys
from shadowkv.kernels.scores import chunk_scores

__all__ = [
    "attend_codes",
    "attend_pages",
    "attend_resident",
    "choose_chunks",
    "chunk_scores",
    "fill_keys",
    "fill_values",
    "page_bounds",
    "plan_fill",
]
