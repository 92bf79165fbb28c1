"""Ranks change: measured, asked for, and carried out."""
