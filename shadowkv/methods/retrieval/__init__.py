"""Methods that keep everything and read a part of it, chosen anew for every token.

Not here: what forgets; ShadowKV and Quest have folders of their own.
"""
