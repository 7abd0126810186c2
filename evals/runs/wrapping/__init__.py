"""Tasks around a task: its questions after the text, answers that are drawn or begin with a thought.

Not here: what is fed instead of an answer (`evals/runs/forced`).
"""
