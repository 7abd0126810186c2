"""Quest: the reference, and its fast layer over pages.

Not here: kernels: those are in `shadowkv/kernels`.
"""
