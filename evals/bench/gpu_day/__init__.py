"""A day on a rented GPU: stages as data, what runs them within a limit, what they found.

Not here: measurements. Stages run commands of `skv`, but for the probe, which looks at the machine below the engine.
"""
