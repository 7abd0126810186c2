"""Methods that forget: what they let go of is gone for every later token.

Not here: what keeps all tokens.
"""
