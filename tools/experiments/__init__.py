"""Races and demonstrations."""
