"""Kernels one by one: inputs, subjects, timing on a GPU, compilation for GPUs that are not here, tables.

Not here: kernels.
"""
