"""Out of and into the low-rank world: consolidated folders, imports, exports."""
