"""What is here, and getting it: `models`, `methods`, `pull`, `calibrate`, `doctor`.

Not here: what could be used without a command line.
"""
