"""Where a decode step's time goes: the profile and its tables.

Not here: timing code: that is one room up.
"""
