"""Before a run starts: what it takes, and whether it fits."""
