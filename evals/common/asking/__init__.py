"""How a prompt is asked and answered: where its question stands, how tokens are drawn, what of an answer is a thought.

Not here: tasks around tasks that do it (`evals/runs/wrapping`).
"""
