"""Records into numbers, tables and plots that every benchmark uses. What a table shows: `table.py` and `summary.py`.

Not here: anything of one benchmark: its own tables are in its `report.py`.
"""
