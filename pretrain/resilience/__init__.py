"""Faults: how a run detects them, survives them, and makes them on purpose."""
