"""The makers of RULER's samples, and how a sample is fitted to a length (`fitting.py`).

Not here: templates, scores.
"""
