"""The format of checkpoints, their writer and their reader."""
