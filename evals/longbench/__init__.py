"""LongBench (https://arxiv.org/abs/2308.14508), LongBench-E and LongBench v2 (https://arxiv.org/abs/2412.15204)."""
