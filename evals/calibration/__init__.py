"""What methods learn about a model once, from a text: the learners, and DuoAttention's training of gates.

Not here: methods; what is learned is read by `shadowkv/methods`.
"""
