"""Tensors by themselves: operations that references are written in (`ops.py`), buffers that grow, codes of few bits,
low-rank fits, memory of the host.

Not here: what knows a model, a method or a prompt.
"""
