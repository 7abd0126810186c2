"""Memory, largest batch and time of a step, predicted: the model of a GPU, and the figures that it is held to; the
order of work in a step, played on a simulated clock.

Not here: what measures.
"""
