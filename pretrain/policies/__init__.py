"""Rank policies: pure decisions about which layer grows to which rank, one module each."""
