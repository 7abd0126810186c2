"""Needle in a haystack: one fact at a given depth of a long text, and a question about it."""
