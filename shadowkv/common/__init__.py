"""What every other room may use and what uses none: errors and their wording, names and sizes as users type them, the
geometry of a model (`dims.py`), where files are kept.

Not here: what computes; anything of a model or a method.
"""
