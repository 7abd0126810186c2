"""Run folders into files and pages: the report, the leaderboard, what each benchmark shows (`presentations.py`).

Not here: what runs a model.
"""
