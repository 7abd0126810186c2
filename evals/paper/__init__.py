"""The experiments of the ShadowKV paper as lists of commands, and its published figures.

Not here: experiments that are not in it.
"""
