"""Texts on their way to a corpus."""
