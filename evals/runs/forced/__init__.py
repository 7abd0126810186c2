"""Continuations that every method is fed, and what is kept of the distributions after each token.

Not here: which texts (`evals/fidelity`), tables and plots.
"""
