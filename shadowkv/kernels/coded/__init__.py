"""Kernels of the decode path that work on codes where they lie, and never write what these stand for.

Not here: how codes are made and told apart (`shadowkv/tensors/stored.py`); what copies tokens out of their codes.
"""
