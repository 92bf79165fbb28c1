"""FLOPs, bytes and messages of a model, as formulas."""
