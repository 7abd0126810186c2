"""Full attention, which all others are measured by: the reference, and its fast layer of preallocated buffers.

Not here: what leaves a token out.
"""
