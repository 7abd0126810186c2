"""`skv bench ...`.

Not here: what could be used without a command line.
"""
