"""Faults: seen, survived, and made on purpose."""
