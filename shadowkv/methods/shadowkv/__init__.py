"""ShadowKV, all of it: `settings.py` (what parameters mean), `method.py` (the reference layer), `resident.py` (the fast
one), and what both are made of. How chunks are chosen: `landmarks.py`.

Not here: kernels: those are in `shadowkv/kernels`.
"""
