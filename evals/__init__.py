"""Benchmarks, measurement, and what is made of their records.

Not here: anything that prints; methods, models, the engine.
"""
