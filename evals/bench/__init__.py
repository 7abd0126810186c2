"""How fast and how large: throughput over contexts and batches, and where a decode step's time goes."""
