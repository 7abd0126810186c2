"""What came out: `report`, `leaderboard`, `compare`, `baseline`.

Not here: what could be used without a command line.
"""
