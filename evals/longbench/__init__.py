"""LongBench, LongBench-E and v2: rows, prompts, truncation, metrics, tables.

Not here: other benchmarks; any of its authors' text.
"""
