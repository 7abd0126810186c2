"""RULER: its tasks, metrics, materials and files. How a prompt is filled: `families/`.

Not here: other benchmarks; any of NVIDIA's text.
"""
