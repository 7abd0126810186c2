"""What a method is: its settings, its cache, what it is given and what it must answer (`method.py`); the usual kind,
layer by layer (`layerwise.py`); how it is named and found (`registry.py`).

Not here: methods, the engine.
"""
