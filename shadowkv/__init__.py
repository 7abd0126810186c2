"""ShadowKV and the KV-cache methods it is compared with, for any Hugging Face RoPE decoder.

Notation used throughout: B batch, S prompt tokens, n tokens held so far, T new tokens, Hq / H query and
key-value heads, G = Hq / H, D head size, W = H * D the width of a layer's keys, C chunks, c tokens per chunk.
"""
