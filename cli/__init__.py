"""The command line: parses, calls, prints. `main.py` is the app; commands are in the rooms below.

Not here: what could be used without a command line.
"""
