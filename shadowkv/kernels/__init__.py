"""Triton kernels of the decode path, and in `slots.py` the plain-torch function of the same name and signature beside
each. `operations.py` chooses.

Not here: what knows a method; what waits for the device.
"""
