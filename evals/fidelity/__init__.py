"""Fidelity: the distribution after every token of a forced continuation, under a method and under full attention.

Not here: the loop that feeds it (`evals/runs/forcing.py`), comparison of two runs.
"""
