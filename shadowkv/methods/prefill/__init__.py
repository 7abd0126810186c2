"""Prefills that are not dense, which any method can start from.

Not here: decoding.
"""
