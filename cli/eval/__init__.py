"""`skv eval ...` and the prompts that they use.

Not here: what could be used without a command line.
"""
