"""A run: what a task is, the loop that answers it (`runner.py`), workers, records and run.json.

Not here: benchmarks, tables.
"""
