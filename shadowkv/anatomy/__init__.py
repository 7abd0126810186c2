"""How a model of transformers is built, found out by looking: its layers, its attention call, its rotary embedding, its
next layer's query. `forward.py` alone knows what transformers calls things.

Not here: code for one family of models, weights, methods.
"""
