"""What several commands share: options, the model asked for, methods and their choice, fetching, printing, exit codes.

Not here: commands.
"""
