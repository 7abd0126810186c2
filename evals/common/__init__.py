"""What benchmarks share below a run: chat templates, texts, seeds, the lists and lengths that users type, JSON lines.

Not here: benchmarks, records, tables.
"""
