"""RULER (https://arxiv.org/abs/2404.06654): thirteen synthetic tasks of any length."""
