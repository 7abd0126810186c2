"""Methods that treat heads of one layer differently.

Not here: training of gates: that is in `evals/calibration`.
"""
