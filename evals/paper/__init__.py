"""The ShadowKV paper's experiments by name."""
