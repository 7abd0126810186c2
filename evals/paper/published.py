"""What ShadowKV's authors published: decode throughput on one A100-80GB, batch sizes in their repository's test/e2e.py.

Source: the project page and repository of arXiv 2410.21465 (bytedance/ShadowKV a21f5a9). Figures only. 60K, 122K and
244K are multiples of 1024 tokens, with budgets of 1024, 2048 and 4096; rank 160, chunks of 8, 4 local chunks.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    model: str
    context: int
    budget: int
    full_tokens_per_s: float
    full_batch: int
    shadowkv_tokens_per_s: float
    shadowkv_batch: int


_K60, _K122, _K244 = (60 * 1024, 1024), (122 * 1024, 2048), (244 * 1024, 4096)
ROWS = [
    Row("llama3-8b-1m", *_K60, 160.62, 8, 455.14, 48),
    Row("llama3-8b-1m", *_K122, 80.77, 4, 239.51, 24),
    Row("llama3-8b-1m", *_K244, 40.37, 2, 119.01, 12),
    Row("llama3.1-8b", *_K60, 160.93, 8, 472.77, 48),
    Row("llama3.1-8b", *_K122, 80.78, 4, 245.90, 24),
    Row("glm4-9b-1m", *_K60, 241.05, 12, 615.89, 50),
    Row("glm4-9b-1m", *_K122, 122.67, 6, 293.40, 25),
    Row("glm4-9b-1m", *_K244, 61.13, 3, 136.51, 12),
    Row("yi-9b-200k", *_K60, 204.81, 10, 544.36, 42),
    Row("yi-9b-200k", *_K122, 101.44, 5, 260.03, 21),
    Row("yi-9b-200k", *_K244, 46.74, 2, 118.55, 10),
]
