"""Run folders in the formats of others.

Not here: formats of our own.
"""
