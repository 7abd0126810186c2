"""The methods. One of a single file stands in the folder of its kind; one of several has a folder that holds all of it.

Not here: anything about models, weights, prompts or scores.
"""
