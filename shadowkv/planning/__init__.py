"""Memory, largest batch and time of a step, predicted: the model of a GPU, and the figures that it is held to.

Not here: what measures.
"""
