"""The sweep over contexts and batches: its plan, its summary, its tables and plots.

Not here: timing code: that is one room up.
"""
