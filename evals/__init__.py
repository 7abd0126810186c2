"""Benchmarks and measurement on top of the engine."""
