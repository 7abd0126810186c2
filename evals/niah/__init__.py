"""Needle in a haystack: prompts, protocols, turns, its tables.

Not here: other benchmarks.
"""
