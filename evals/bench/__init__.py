"""Measurements of speed: prompts, contenders, memory, timing and what both kinds of runs share.

Not here: accuracy.
"""
