"""Which model, and its weights: presets and packs, what a name means, loading and what is refused, adapters, GGUF,
sizes without weights.

Not here: what runs one; that is `shadowkv/engine`.
"""
