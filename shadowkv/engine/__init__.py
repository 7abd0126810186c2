"""Running a model through caches: prefill, replay, decode (`engine.py`); the dense prompt that is recorded, the
cache that a model is given, a prompt that is streamed, the check of a model against itself.

Not here: methods, benchmarks.
"""
