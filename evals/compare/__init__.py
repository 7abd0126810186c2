"""Two runs against each other: what may be compared, the statistics, verdicts, baselines.

Not here: what runs a model.
"""
