"""Methods that keep every token in fewer bits or directions.

Not here: what leaves a token out by itself.
"""
