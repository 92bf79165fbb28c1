"""The format of a checkpoint, its commit, and its one reader."""
